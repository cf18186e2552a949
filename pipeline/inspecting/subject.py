"""A run as the page tells of it: what it was, what it came to, what flowed through it, what that cost.

Read from manifests and `experiment.toml`; the only rows read here are the labels of evaluations.
"""

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.artifacts import Artifact
from pipeline.catalog import EXPERIMENT_FILE, Entry, catalog
from pipeline.contracts import LABELS
from pipeline.errors import ExperimentError
from pipeline.grading.measures import clustered
from pipeline.settings import flat

Z = 1.959964
"""Of a two-sided interval of 95 %."""


@dataclass(frozen=True)
class HeldOut:
    """Accuracy on held-out prompts of the policy that an iteration began with."""

    iteration: int
    accuracy: float
    error: float
    """Standard error over prompts; NaN with a single prompt."""
    prompts: int
    responses: int


@dataclass(frozen=True)
class Subject:
    """One run."""

    name: str
    """Of its directory; its path where several have the same."""
    folder: Path
    entries: tuple[Entry, ...]
    """What it made and what that was made of, as `catalog` has it."""
    experiment: Mapping[str, Any]
    text: str
    """Of its experiment.toml."""

    @classmethod
    def of(cls, folder: Path, name: str) -> Self:
        """Raises `ExperimentError` for an experiment.toml that is none."""
        file = folder / EXPERIMENT_FILE
        text = file.read_text(encoding="utf-8")
        try:
            experiment = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ExperimentError(f"not TOML: {error}", str(file), "`rlhf run` writes it anew") from error
        return cls(name, folder, tuple(catalog([folder])), experiment, text)

    @cached_property
    def own(self) -> tuple[Entry, ...]:
        """What the run itself made in its loop and its evaluations, and goes by, in order."""
        here = self.folder.resolve()
        found = [
            one
            for one in self.entries
            if one.iteration is not None and one.variant is None and here in one.artifact.path.resolve().parents
        ]
        return tuple(sorted(found, key=lambda one: (one.phase, one.iteration, one.stage)))

    def of_kind(self, kind: str, phase: str) -> list[Entry]:
        """Those of `own` of a contract."""
        return [one for one in self.own if one.kind == kind and one.phase == phase]

    @cached_property
    def iterations(self) -> tuple[int, ...]:
        """Those of which anything is there."""
        return tuple(sorted({one.iteration for one in self.own if one.phase == "loop" and one.iteration is not None}))

    @cached_property
    def finished(self) -> int:
        """Iterations that ended with a policy."""
        return len(self.of_kind("policy", "loop"))

    @cached_property
    def held_out(self) -> tuple[HeldOut, ...]:
        """One for each evaluation that has right and wrong."""
        found = (_held_out(one.iteration or 0, one.artifact) for one in self.of_kind(LABELS.name, "evaluation"))
        return tuple(one for one in found if one is not None)

    def about(self, promoted: str | None) -> dict[str, Any]:
        """The head of the page; `promoted` is where its link leads."""
        recipe = self.experiment.get("recipe", {})
        made = sorted((one.artifact.manifest.made for one in self.own), key=lambda told: str(told.get("time", "")))
        commits = list(dict.fromkeys(_commit(told) for told in made))
        return {
            "name": self.name, "folder": str(self.folder), "promoted": promoted,
            "recipe": recipe.get("name", ""), "idea": recipe.get("idea", ""), "paper": recipe.get("paper", ""),
            "finished": self.finished, "planned": self.experiment.get("scale", {}).get("iterations"),
            "responses": int(sum(one.artifact.stats.get("rows", 0) for one in self.of_kind("rollouts", "loop"))),
            "seconds": sum(one.artifact.stats.get("seconds", 0.0) for one in self.own),
            "held_out": [interval(one) for one in self.held_out],
            "begun": made[0].get("time") if made else None, "ended": made[-1].get("time") if made else None,
            "commits": [commit for commit in commits if commit],
        }  # fmt: skip

    def flows(self) -> list[dict[str, Any]]:
        """What was made of what: the foundations, then every iteration and every evaluation."""
        nodes = {_key(one): one for one in self.entries if one.variant is None}
        own = set(map(id, self.own))
        groups: dict[str, list[Entry]] = {}
        for one in (one for one in self.entries if one.iteration is None and one.variant is None):
            groups.setdefault("foundations", []).append(one)
        for one in self.own:
            title = f"{'iteration' if one.phase == 'loop' else 'evaluation of policy'} {one.iteration}"
            groups.setdefault(title, []).append(one)
        order = sorted(groups.items(), key=lambda item: _place(item[1][0]))
        return [{"title": title, **self._flow(made, nodes, own)} for title, made in order]

    def _flow(self, made: Sequence[Entry], nodes: Mapping[tuple[str, str], Entry], own: set[int]) -> dict[str, Any]:
        numbers: dict[tuple[str, str], int] = {}
        edges = []
        for one in made:
            numbers.setdefault(_key(one), len(numbers))
        for one in made:
            for records in one.artifact.manifest.inputs.values():
                for key in ((record.fingerprint, record.digest) for record in records):
                    if key in nodes:
                        edges.append((numbers.setdefault(key, len(numbers)), numbers[_key(one)]))
        inside = {_key(one) for one in made}
        return {
            "nodes": [self._node(nodes[key], inside=key in inside, own=own) for key in numbers],
            "edges": sorted(set(edges)),
        }

    def _node(self, one: Entry, *, inside: bool, own: set[int]) -> dict[str, Any]:
        stats = one.artifact.stats
        place = one.stage if one.iteration is None else f"{one.iteration:04d}/{one.stage}"
        node: dict[str, Any] = {"name": one.stage if inside else place, "kind": one.kind, "inside": inside}
        if not inside and id(one) not in own and one.run != self.folder.name:
            node["from"] = one.run
        return node | {name: stats[name] for name in ("rows", "seconds", "tokens", "groups/kept") if name in stats}

    def costs(self) -> list[dict[str, Any]]:
        """Seconds by phase, iteration (null for foundations) and stage."""
        seconds: Counter[tuple[str, int | None, str]] = Counter()
        made: Counter[tuple[str, int | None, str]] = Counter()
        own = {id(one) for one in self.own}
        for one in self.entries:
            if one.variant is None and (one.iteration is None or id(one) in own):
                key = (one.phase, one.iteration, one.artifact.manifest.stage)
                seconds[key] += one.artifact.stats.get("seconds", 0.0)  # type: ignore[assignment]
                made[key] += 1
        return [
            {"phase": phase, "iteration": iteration, "stage": stage, "seconds": spent, "artifacts": made[key]}
            for key, spent in seconds.items()
            for phase, iteration, stage in [key]
        ]


def interval(one: HeldOut) -> dict[str, float]:
    """For JSON, with the ends of the 95 % interval where there is one."""
    half = Z * one.error
    ends = {} if np.isnan(half) else {"low": max(0.0, one.accuracy - half), "high": min(1.0, one.accuracy + half)}
    return {
        "iteration": one.iteration, "accuracy": one.accuracy, "prompts": one.prompts, "responses": one.responses, **ends
    }  # fmt: skip


def _held_out(iteration: int, labels: Artifact) -> HeldOut | None:
    rows = pl.read_parquet(labels.part_paths(), columns=["prompt_id", "gold"]).drop_nulls("gold")
    if rows.is_empty():
        return None
    mean, error = clustered(rows["gold"].cast(pl.Float64).to_numpy(), np.asarray(rows["prompt_id"].to_list()))
    return HeldOut(iteration, mean, error, rows["prompt_id"].n_unique(), rows.height)


def _commit(made: Mapping[str, Any]) -> str:
    git = made.get("git") or {}
    return "" if not git.get("commit") else git["commit"][:10] + (" and changes" if git.get("dirty") else "")


def _key(one: Entry) -> tuple[str, str]:
    return one.artifact.manifest.fingerprint, one.artifact.manifest.digest


def _place(one: Entry) -> tuple[int, int]:
    """Foundations first; the evaluation of a policy before the iteration that begins with it."""
    return (-1, 0) if one.iteration is None else (one.iteration, 0 if one.phase == "evaluation" else 1)


def subjects(folders: Sequence[Path]) -> list[Subject]:
    """One for each run, under names that differ."""
    names = Counter(folder.resolve().name for folder in folders)
    return [Subject.of(folder, _name(folder, names)) for folder in folders]


def _name(folder: Path, names: Mapping[str, int]) -> str:
    name = folder.resolve().name
    return str(folder) if names[name] > 1 else name


def differences(several: Sequence[Subject]) -> list[dict[str, Any]]:
    """What the experiments of several runs do not have in common: a setting, and its value in each (null: absent)."""
    settings = [flat(one.experiment) for one in several]
    every = {key: [one.get(key) for one in settings] for key in dict.fromkeys(key for one in settings for key in one)}
    return [{"setting": key, "values": values} for key, values in every.items() if len(set(map(repr, values))) > 1]
