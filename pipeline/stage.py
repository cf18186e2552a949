"""A stage: a function that reads artifacts and writes one, known by its signature.

    @stage(writes=LABELS, version=1)
    def label(inputs: Inputs, settings: Settings, out: Outbox) -> None: ...

`Inputs` is a frozen dataclass whose annotations name the contracts: `Annotated[Artifact, ROLLOUTS]`, with `| None`
for an input that may be absent and `tuple[Artifact, ...]` for several; `Annotated[tuple[Path, ...], FILES]` is files
from outside. Everything else follows: what is read and written, the command line, fingerprint, reuse, commit.
"""

import argparse
import dataclasses
import inspect
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, Union, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import Field, ValidationError

from pipeline import lifeline, storage
from pipeline.artifacts import (
    Artifact,
    InputRecord,
    Manifest,
    Outbox,
    Shadow,
    digest_of,
    file_record,
    fingerprint_of,
)
from pipeline.contracts import Contract
from pipeline.disk import of_storage, storage_error
from pipeline.errors import ArtifactError, BusyError, ExperimentError, InputError, PipelineError, WaitingError
from pipeline.experiment import Experiment
from pipeline.locks import PAUSE
from pipeline.metrics import console
from pipeline.models.lora import Lora
from pipeline.ranks import count, rank
from pipeline.settings import Settings, explain, flat, override

FILES: Final = "files"
"""Marks an input that is files from outside rather than an artifact."""

ERROR_FILE: Final = "RLHF_ERROR_FILE"
"""Environment variable with the path of a file: the launcher reads there what went wrong, and raises it."""

OTHER_BYTES: Final = "has other bytes"
"""What is said of an input that is not what it was."""

Paths = Mapping[str, Path | Sequence[Path] | None]


class StageSettings(Settings):
    """Base of a stage's settings: the slice of the experiment that it reads."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The values that `experiment` gives; `changes` may say which part of it is meant."""
        raise TypeError(f"{cls.__module__} takes nothing from an experiment")

    @classmethod
    def of(cls, experiment: Experiment | None, changes: Mapping[str, Any] | None = None) -> Self:
        """Settings from an experiment with `changes` on top. Raises `ExperimentError` naming field and value."""
        changes = changes or {}
        base = cls.slice(experiment, changes) if experiment is not None else {}
        try:
            return cls.model_validate({**base, **changes})
        except ValidationError as error:
            raise ExperimentError(
                explain(error),
                f"settings of stage {cls.__module__.rpartition('.')[2]}",
                "give it with --set name=value",
            ) from error


class ModelSettings(StageSettings):
    """Base of the settings of stages that compute with a model."""

    micro_batch_tokens: int = Field(16384, ge=1)
    """Tokens that fit into memory at once, prompts counted with each of their responses; without a GPU at most 4,096
    are taken, which is faster than more. A prompt with responses that are compared is never divided."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model's layers; weights and what is written stay float32."""

    @staticmethod
    def computing(experiment: Experiment) -> dict[str, Any]:
        """These settings, from `resources`."""
        resources = experiment.resources
        return {"micro_batch_tokens": resources.micro_batch_tokens, "compute_dtype": resources.compute_dtype}


class TrainingSettings(ModelSettings):
    """Base of the settings of stages that train a model."""

    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, of all matrices."""
    gradient_clip: float = Field(1.0, gt=0)
    """Longest gradient; a longer one is scaled down to it."""
    recompute: bool = False
    """Keep the layers' inputs alone for the backward pass: less memory, a third more work, the same gradients."""
    offload: bool = False
    """Keep the optimizer's moments in the host's memory, and step there."""
    lora: Lora | None = None
    """Train low-rank adapters of the layers in place of their weights; what is written are whole weights."""
    save_every: int = Field(100, ge=0)
    """Optimizer steps between two savings, from which the training goes on after a crash; 0: none."""
    seed: int = 0
    """Of the run: what is drawn follows from it, new weights and the order of the rows."""

    @staticmethod
    def training(experiment: Experiment) -> dict[str, Any]:
        """These settings but the weight decay, from `resources`, `scale` and `seed`."""
        return {
            **ModelSettings.computing(experiment), "recompute": experiment.resources.recompute,
            "offload": experiment.resources.offload,
            "gradient_clip": experiment.scale.gradient_clip, "save_every": experiment.resources.save_every,
            "seed": experiment.seed,
        }  # fmt: skip


@dataclass(frozen=True)
class InputSpec:
    """One field of a stage's `Inputs`."""

    name: str
    contract: Contract | None
    """None: files from outside."""
    many: bool
    optional: bool

    @classmethod
    def of(cls, name: str, annotation: Any) -> Self:
        """Read `Annotated[Artifact | None, CONTRACT]` and its relatives."""
        annotated, absent_outside = _without_absent(annotation)
        inner, marker = get_args(annotated)[:2]
        kind, absent_inside = _without_absent(inner)
        optional = absent_outside or absent_inside
        return cls(name, None if marker == FILES else marker, get_origin(kind) is tuple, optional)


def _without_absent(annotation: Any) -> tuple[Any, bool]:
    """The annotation without `| None`, and whether it had that."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    return next(a for a in get_args(annotation) if a is not types.NoneType), True


@dataclass(frozen=True)
class Stage:
    """A stage function with everything that its signature says. `@stage` makes it."""

    name: str
    function: Callable[[Any, Any, Outbox], None]
    writes: tuple[Contract, ...]
    version: int
    hardware: str
    """`cpu`, or `gpu` where one helps."""
    ranks: bool
    """Whether several processes can share its work under torchrun."""
    shards: bool
    """Whether its work is made of shards that a cluster's workers can do."""
    settings_type: type[StageSettings]
    inputs_type: type[Any]
    inputs: tuple[InputSpec, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the inputs, as the stage table prints them."""
        return tuple(f"{spec.name}?" if spec.optional else spec.name for spec in self.inputs)

    @property
    def summary(self) -> str:
        """First line of the stage's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def contract(self, settings: StageSettings) -> Contract:
        """What this computation writes; a stage that can write several kinds has a setting `kind`."""
        if len(self.writes) == 1:
            return self.writes[0]
        return next(contract for contract in self.writes if contract.name == getattr(settings, "kind"))  # noqa: B009

    def run(self, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None) -> Artifact:
        """Return the artifact of this computation at `out`, made now unless it is already there.

        Raises `ArtifactError` when `out` holds another computation, and whatever the stage raises; what it had
        finished by then is kept for the next try, except after an error of the request itself and while people are
        waited for.
        """
        opened, fingerprint = self._identify(settings, paths)
        looked_at = False
        while (done := self._reuse(out, settings, opened, fingerprint)) is None:
            if not looked_at:
                _ensure_sound(opened)
                looked_at = True
            try:
                outbox = self._outbox(Outbox, out, settings, opened, fingerprint)
            except BusyError as busy:
                console.progress(f"waiting: {busy.what}")
                time.sleep(PAUSE)
                continue
            _agreed(True)
            return self._made(outbox, settings, opened)
        _agreed(False)
        return done

    def follow(self, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None) -> None:
        """Do this process's share where rank 0 runs this computation; nothing where that finds it done."""
        opened, fingerprint = self._identify(settings, paths)
        if not _agreed(False):
            return
        _ensure_sound(opened)
        shadow = self._outbox(Shadow, out, settings, opened, fingerprint)
        try:
            self.function(self._inputs(opened), settings, shadow)
        finally:
            shadow.close()

    def _outbox(
        self, kind: type[Outbox], out: Path, settings: StageSettings, opened: "Opened", fingerprint: str
    ) -> Outbox:
        return kind(
            out, self.contract(settings), self.name, self.version, fingerprint, settings.model_dump(mode="json"),
            _records(opened),
        )  # fmt: skip

    def _made(self, outbox: Outbox, settings: StageSettings, opened: "Opened") -> Artifact:
        console.subject = f"{outbox.target.parent.name}/{outbox.target.name}"
        try:
            self.function(self._inputs(opened), settings, outbox)
            made = outbox.commit()
        except PipelineError as error:
            if error.exit_code == ExperimentError.exit_code or isinstance(error, WaitingError):
                outbox.discard()
            raise
        except Exception as error:
            if of_storage(error):
                raise storage_error(error, outbox.target) from error
            raise
        finally:
            outbox.close()
        if len(outbox.written) == len(made.part_paths()) == 1:  # between parts nobody has looked
            _sound.add(_content(made))
        return made

    def committed(self, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None) -> Artifact | None:
        """The artifact at `out` if it is this exact computation; None if nothing is there. Starts nothing."""
        if not storage.there(out):
            return None
        opened, fingerprint = self._identify(settings, paths)
        return self._reuse(out, settings, opened, fingerprint)

    def command(
        self,
        out: Path,
        settings: StageSettings,
        experiment: tuple[Experiment, Path] | None = None,
        python: str = sys.executable,
        **paths: Path | Sequence[Path] | None,
    ) -> list[str]:
        """The words that a person would type for this computation.

        Settings that `experiment` gives already are left out, except those that its slice depends on.
        """
        words = [
            python,
            "-m",
            self.function.__module__ if self.function.__module__ != "__main__" else f"stages.{self.name}",
        ]
        if experiment is not None:
            words += ["--experiment", str(experiment[1])]
        for spec in self.inputs:
            given = _as_list(paths.get(spec.name))
            words += [f"--{spec.name.replace('_', '-')}", *map(str, given)] if given else []
        for assignment in self._assignments(settings, experiment[0] if experiment is not None else None):
            words += ["--set", assignment]
        return [*words, "--out", str(out)]

    def _assignments(self, settings: StageSettings, experiment: Experiment | None) -> Iterator[str]:
        """What to write after `--set` to get from the experiment's slice, or from nothing, to `settings`."""
        values, present = settings.model_dump(mode="json"), settings.model_dump(mode="json", exclude_none=True)
        changes = Changes(values)
        base = self.settings_type.slice(experiment, changes) if experiment is not None else {}
        for name, info in type(settings).model_fields.items():
            before = base.get(name, info.get_default(call_default_factory=True))
            if values[name] is None and before is not None:
                yield f"{name}="
            elif name in present and (experiment is None or name in changes.read or _plain(before) != present[name]):
                yield f"{name}={_as_toml(present[name])}"
                yield from (f"{place}=" for place, value in flat({name: values[name]}).items() if value is None)

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command line of this stage; exits with 0, 1 (failed) or 2 (the request was wrong)."""
        with lifeline.left_at_once() if self.function.__module__ == "__main__" else nullcontext():
            self._main(arguments)

    def _main(self, arguments: Sequence[str] | None) -> None:
        lifeline.hold()
        report = os.environ.pop(ERROR_FILE, None)
        try:
            with _joined():
                self.run_arguments(self.parser().parse_args(arguments))
        except PipelineError as error:
            if report is None:
                sys.stderr.write(f"error: {error}\n")
            else:
                told = {"kind": type(error).__name__, "what": error.what, "where": error.where, "do": error.do}
                with suppress(FileExistsError), Path(report).open("x", encoding="utf-8") as file:
                    json.dump(told, file)
            sys.exit(error.exit_code)

    def run_arguments(self, given: argparse.Namespace) -> Artifact | None:
        """Run what a parsed command line asks for and say where it lies; None where another process writes it."""
        changes = override({}, given.set)
        experiment = Experiment.load(given.experiment) if given.experiment else None
        paths = {spec.name: getattr(given, spec.name) for spec in self.inputs}
        if experiment is not None and changes:
            base = {name: _plain(v) for name, v in self.settings_type.slice(experiment, changes).items()}
            touched = override(base, given.set)
            changes = {name: touched[name] for name in changes}
        settings = self.settings_type.of(experiment, changes)
        if rank():
            self.follow(given.out, settings, **paths)
            return None
        artifact = self.run(given.out, settings, **paths)
        sys.stderr.write(f"{self.name} -> {artifact.path}  digest {artifact.manifest.digest[:16]}\n")
        return artifact

    def parser(self) -> argparse.ArgumentParser:
        """One option per input, `--experiment`, `--set`, `--out`; the epilog lists the settings."""
        parser = argparse.ArgumentParser(
            prog=f"rlhf stage {self.name}",
            description=inspect.getdoc(self.function),
            epilog=_settings_help(self.settings_type),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for spec in self.inputs:
            what = "files from outside" if spec.contract is None else f"{spec.contract.name} artifact"
            parser.add_argument(
                f"--{spec.name.replace('_', '-')}", dest=spec.name, type=storage.place,
                nargs="+" if spec.many else None, required=not spec.optional, metavar="PATH",
                help=what + (" (optional)" if spec.optional else ""),
            )  # fmt: skip
        parser.add_argument("--experiment", type=Path, help="take the settings from this experiment file")
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="change one setting (nothing after =: none)",
        )
        parser.add_argument("--out", type=storage.place, required=True, help="directory to make")
        return parser

    def _identify(self, settings: StageSettings, paths: Paths) -> tuple["Opened", str]:
        opened = {spec.name: _open(self.name, spec, paths.get(spec.name)) for spec in self.inputs}
        given = settings.model_dump(mode="json")
        return opened, fingerprint_of(self.name, self.version, given, _records(opened))

    def _reuse(self, out: Path, settings: StageSettings, opened: "Opened", fingerprint: str) -> Artifact | None:
        if not storage.there(out):
            return None
        there = Artifact.open(out)
        if there.manifest.fingerprint == fingerprint:
            return there
        difference = self._difference(there.manifest, settings, opened)
        do = "choose another --out (or --name), or delete it to make it again"
        if OTHER_BYTES in difference:
            do = f"`rlhf redo RUN --stale` makes again what was made of other bytes; or {do}"
        raise ArtifactError(f"made by a different computation ({difference})", str(out), do)

    def _difference(self, there: Manifest, settings: StageSettings, opened: "Opened") -> str:
        if (there.stage, there.version) != (self.name, self.version):
            return f"stage {there.stage} version {there.version} -> {self.name} version {self.version}"
        old, new = flat(there.settings), flat(settings.model_dump(mode="json"))
        changed = [
            f"{self.name}.{k}: {old.get(k)!r} -> {new.get(k)!r}"
            for k in sorted({*old, *new})
            if old.get(k) != new.get(k)
        ]
        records = _records(opened)
        for name in sorted({*there.inputs, *records}):
            if [r.digest for r in there.inputs.get(name, [])] != [r.digest for r in records.get(name, [])]:
                changed.append(f"input {name} {OTHER_BYTES}")
        return "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")

    def _inputs(self, opened: "Opened") -> Any:
        values: dict[str, Any] = {}
        for spec in self.inputs:
            items = opened[spec.name]
            whole = [item.path if isinstance(item, ForeignFile) else item for item in items]
            values[spec.name] = tuple(whole) if spec.many else (whole[0] if whole else None)
        return self.inputs_type(**values)


class Changes(Mapping[str, Any]):
    """Settings that remember which of them were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class ForeignFile:
    """A file from outside, named by its bytes."""

    path: Path
    record: InputRecord


Opened = dict[str, "list[Artifact | ForeignFile]"]


def stage(
    *,
    writes: Contract | tuple[Contract, ...],
    version: int,
    hardware: str = "cpu",
    ranks: bool = False,
    shards: bool = False,
) -> Callable[[Callable[[Any, Any, Outbox], None]], Stage]:
    """Turn `name(inputs, settings, out)` into a `Stage`. `version` rises when results change."""

    def decorate(function: Callable[[Any, Any, Outbox], None]) -> Stage:
        hints = get_type_hints(function)
        fields = get_type_hints(hints["inputs"], include_extras=True)
        specs = tuple(InputSpec.of(f.name, fields[f.name]) for f in dataclasses.fields(hints["inputs"]))
        kinds = writes if isinstance(writes, tuple) else (writes,)
        return Stage(
            function.__name__, function, kinds, version, hardware, ranks, shards, hints["settings"], hints["inputs"],
            specs,
        )  # fmt: skip

    return decorate


def _open(stage_name: str, spec: InputSpec, given: Path | Sequence[Path] | None) -> "list[Artifact | ForeignFile]":
    paths = _as_list(given)
    if not paths and not spec.optional:
        raise InputError(
            f"stage {stage_name} needs --{spec.name.replace('_', '-')}", do=f"`rlhf stage {stage_name} --help`"
        )
    if spec.contract is None:
        return [_open_file(path) for path in paths]
    return [Artifact.open(path, spec.contract) for path in paths]


def _open_file(path: Path) -> ForeignFile:
    if not path.exists():
        raise InputError("no such file", str(path), "check the path; in an experiment it starts at data.folder")
    digest = digest_of_file(path)
    return ForeignFile(path, InputRecord(path=str(path), fingerprint=digest, digest=digest))


def digest_of_file(path: Path) -> str:
    """Name the bytes of a file or folder from outside."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return digest_of({p.name if p == path else p.relative_to(path).as_posix(): file_record(p) for p in files})


_sound: set[tuple[str, int, str]] = set()
"""Contract, its version and the digest of tables that keep it: whether they do is a function of their bytes."""


def _content(artifact: Artifact) -> tuple[str, int, str]:
    return artifact.contract.name, artifact.contract.version, digest_of(artifact.manifest.files)


def _ensure_sound(opened: Opened) -> None:
    """Raise unless all inputs are as they were made, and tables keep their contract."""
    for artifacts in opened.values():
        for item in artifacts:
            if isinstance(item, Artifact):
                item.ensure_whole()
                if item.contract.is_table and (content := _content(item)) not in _sound:
                    item.check()
                    _sound.add(content)


def _records(opened: Opened) -> dict[str, list[InputRecord]]:
    return {
        name: [item.record if isinstance(item, ForeignFile) else item.record() for item in items]
        for name, items in opened.items()
        if items
    }


def _as_list(given: Path | Sequence[Path] | None) -> list[Path]:
    if given is None:
        return []
    return [Path(given)] if isinstance(given, str | os.PathLike) else [Path(p) for p in given]


def _plain(value: Any) -> Any:
    """A setting's value as JSON has it, without empty fields."""
    if isinstance(value, Settings):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _as_toml(value: Any) -> str:
    """A value on one line of TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def _key(name: str) -> str:
    return tomli_w.dumps({name: 0}).removesuffix(" = 0\n")


@contextmanager
def _joined() -> Iterator[None]:
    """Be one of several processes, where torchrun started this one. torch is not imported otherwise."""
    if count() == 1:
        yield
        return
    from pipeline.models.distributed import joined

    with joined():
        yield


def _agreed(make: bool) -> bool:
    """Whether there is something to make, as rank 0 says."""
    if count() == 1:
        return make
    from pipeline.models.distributed import told

    return bool(told(make))


def _settings_help(settings_type: type[StageSettings]) -> str:
    lines = ["settings (--set name=value; nested: --set table.name=value):"]
    for name, info in settings_type.model_fields.items():
        default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
        lines.append(f"  {name:<20} {info.description or ''} [{default}]")
    return "\n".join(lines)
