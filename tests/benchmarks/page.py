"""The page of a run of 100 iterations x 1024 responses of 64 tokens: seconds to build, size, memory.

    .venv/bin/python tests/benchmarks/page.py

The run is planted: real artifacts under real contracts, with every column that the token heat map knows, an evaluation
every tenth iteration and a tokenizer of 32,000 words in every policy. The page is built by `rlhf report` in a process
of its own. Exit code 1 beyond a limit.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from measuring import ROOT, rlhf, store, verdict
from tokenizers import Tokenizer, models

sys.path.insert(0, str(ROOT))

from pipeline.artifacts import Artifact, Outbox
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.contracts import ADVANTAGES, LABELS, POLICY, PROMPTS, ROLLOUTS, SCORES, Contract

SECONDS, MEGABYTES = 20.0, 10.0
"""What the page may take."""
WORDS = 32_000

MEASURED = {
    "rollout": [("length/mean", "tokens"), ("length/max", "tokens"), ("length/cut", "fraction"),
                ("speed/tokens_per_second", "tokens/s"), ("duplicates/in_group", "fraction")],
    "label": [("reward/mean", "reward"), ("reward/zero_spread_groups", "fraction"), ("accuracy/mean", "fraction"),
              ("accuracy/pass_at_k", "fraction"), ("accuracy/majority_at_k", "fraction")],
    "score": [("kl/reference", "nat"), ("kl/sampler", "nat"), ("kl/sampler_abs", "nat")],
    "advantage": [("reward/shaped_mean", "reward"), ("reward/zero_signal_groups", "fraction"),
                  ("value/explained_variance", "")],
    "update": [("clip/low", "fraction"), ("clip/high", "fraction"), ("entropy/mean", "nat"), ("grad/norm", ""),
               ("learning_rate", ""), ("kl/old", "nat"), ("speed/tokens_per_second", "tokens/s")],
}  # fmt: skip
"""Stage -> what it measures."""


@dataclass(frozen=True)
class Shape:
    """How much there is of everything."""

    iterations: int = 100
    groups: int = 64
    group_size: int = 16
    tokens: int = 64
    every: int = 10
    held_out: int = 64
    samples: int = 4


class Plant:
    """Writes a run."""

    def __init__(self, root: Path, shape: Shape) -> None:
        self.root, self.run, self.shape = root, root / "planted", shape
        self.random = np.random.default_rng(0)
        self.words = np.array([f"w{number}" for number in range(WORDS)])
        tokenizer = Tokenizer(
            models.WordLevel({word: number for number, word in enumerate(self.words)}, unk_token="w0")
        )
        self.tokenizer = tokenizer.to_str()

    def grow(self) -> Path:
        """The whole run; its directory."""
        self.run.mkdir(parents=True)
        experiment = (
            f'name = "planted"\nseed = 0\n[recipe]\nname = "planted"\n[scale]\niterations = {self.shape.iterations}\n'
        )
        (self.run / EXPERIMENT_FILE).write_text(experiment, encoding="utf-8")
        self.prompts = self._prompts("prompts", 4000)
        self.held_out = self._prompts("held_out", self.shape.held_out)
        policy = self._policy(self.root / "base" / "sft", {})
        for iteration in range(self.shape.iterations):
            if iteration % self.shape.every == 0:
                self._evaluation(iteration, policy)
            policy = self._iteration(iteration, policy)
        self._evaluation(self.shape.iterations, policy)
        return self.run

    def _made(
        self, path: Path, contract: Contract, stage: str, inputs: dict[str, Artifact], table: pa.Table | None
    ) -> Artifact:
        records = {name: [one.record()] for name, one in inputs.items()}
        name = f"{path.parent.name}/{path.name}"
        outbox = Outbox(path, contract, stage, 1, name.replace("/", "").ljust(16, "0"), {}, records)
        for metric, unit in MEASURED.get(stage, ()):
            outbox.metrics.add(metric, float(self.random.random()), unit)
        if table is None:
            (outbox.path / "tokenizer.json").write_text(self.tokenizer, encoding="utf-8")
            (outbox.path / "of.txt").write_text(name, encoding="utf-8")
        else:
            outbox.write(0, table)
        return outbox.commit()

    def _prompts(self, name: str, count: int) -> Artifact:
        rows = [
            {"prompt_id": f"{name}{number:08d}", "messages": [{"role": "user", "content": f"{name} {number}?"}],
             "answer": "w1", "grader": "exact", "source": "planted"}
            for number in range(count)
        ]  # fmt: skip
        table = pa.Table.from_pylist(rows, schema=PROMPTS.schema())
        return self._made(self.root / "base" / name, PROMPTS, "ingest", {}, table)

    def _policy(self, path: Path, inputs: dict[str, Artifact]) -> Artifact:
        return self._made(path, POLICY, "update" if inputs else "sft", inputs, None)

    def _evaluation(self, iteration: int, policy: Artifact) -> None:
        here = self.run / "eval" / f"{iteration:04d}"
        ids = [f"held_out{number:08d}" for number in range(self.shape.held_out)]
        self._sampled(here, "", ids, self.shape.samples, policy, self.held_out)

    def _iteration(self, iteration: int, policy: Artifact) -> Artifact:
        here, groups = self.run / f"{iteration:04d}", self.shape.groups
        ids = [f"prompts{(iteration * groups + number) % 4000:08d}" for number in range(groups)]
        rollouts, labels = self._sampled(here, "-0", ids, self.shape.group_size, policy, self.prompts)
        base, rows = rollouts.table(), int(rollouts.stats["rows"])
        keys = {name: base[name] for name in ("prompt_id", "sample")}
        scored = {name: self._floats(rows, low=True) for name in ("old_logprobs", "ref_logprobs")}
        scored["values"] = self._floats(rows)
        table = pa.table({**keys, **scored})
        scores = self._made(here / "scores", SCORES, "score", {"rollouts": rollouts, "policy": policy}, table)
        rest = {name: base[name] for name in ("prompt_tokens", "response_tokens")}
        reward = labels.table(["reward"])["reward"]
        told = {"correct": labels.table(["correct"])["correct"], "finished": pa.array([True] * rows)}
        credit = {"advantages": self._floats(rows), "returns": self._floats(rows)}
        table = pa.table({**keys, **rest, **credit, **scored, "reward": reward, "shaped_reward": reward, **told})
        inputs = {"rollouts": rollouts, "labels": labels, "scores": scores}
        advantages = self._made(here / "advantages", ADVANTAGES, "advantage", inputs, table)
        return self._policy(here / "policy", {"advantages": advantages, "policy": policy})

    def _sampled(
        self, here: Path, turn: str, ids: list[str], samples: int, policy: Artifact, prompts: Artifact
    ) -> tuple[Artifact, Artifact]:
        rows = len(ids) * samples
        tokens = self.random.integers(0, WORDS, (rows, self.shape.tokens), dtype=np.int32)
        keys = {"prompt_id": np.repeat(ids, samples), "sample": np.tile(np.arange(samples, dtype=np.int32), len(ids))}
        asked = pa.array(self.random.integers(0, WORDS, (rows, 8), dtype=np.int32).tolist(), pa.list_(pa.int32()))
        table = pa.table(
            {
                **keys, "prompt_tokens": asked, "response_tokens": self._lists(tokens),
                "response": [" ".join(row) for row in self.words[tokens]],
                "sampler_logprobs": self._floats(rows, low=True),
                "finish": self.random.choice(["stop", "length"], rows, p=[0.9, 0.1]), "seed": np.arange(rows),
            }
        )  # fmt: skip
        inputs = {"prompts": prompts, "policy": policy}
        rollouts = self._made(here / f"rollouts{turn}", ROLLOUTS, "rollout", inputs, table)
        right, keep = self.random.random((2, rows)) < 0.5
        found, nothing = pa.array(self.words[tokens[:, -1]]), pa.array([None] * rows, pa.float32())
        table = pa.table(
            {
                **keys, "reward": right.astype(np.float32), "correct": right, "gold": right, "extracted": found,
                "target": found, "verdict": np.where(right, "correct", "wrong"), "vote_share": nothing, "keep": keep,
                "dropped": pa.array([None if kept else "constant outcomes" for kept in keep], pa.string()),
            }
        )  # fmt: skip
        return rollouts, self._made(
            here / f"labels{turn}", LABELS, "label", {"rollouts": rollouts, "prompts": prompts}, table
        )

    def _floats(self, rows: int, *, low: bool = False) -> pa.Array:
        values = self.random.standard_normal((rows, self.shape.tokens)).astype(np.float32)
        return self._lists(-np.abs(values) if low else values)

    def _lists(self, values: np.ndarray) -> pa.Array:
        ends = np.arange(0, values.size + 1, self.shape.tokens, dtype=np.int32)
        return pa.ListArray.from_arrays(ends, values.ravel())


def main() -> None:
    """Plant, build, print, refuse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=Shape.iterations)
    parser.add_argument("--tokens", type=int, default=Shape.tokens)
    parser.add_argument("--keep", type=Path, help="where run and page stay; a temporary folder when absent")
    asked = parser.parse_args()
    shape = Shape(iterations=asked.iterations, tokens=asked.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        run = folder / "planted"
        if not run.exists():
            run = Plant(folder, shape).grow()
        file = folder / "report.html"
        usage = rlhf("report", run, "-o", file)
        megabytes = file.stat().st_size / 1e6
    told = {
        "responses": shape.iterations * shape.groups * shape.group_size, "tokens_each": shape.tokens,
        "seconds": round(usage.seconds, 2), "limit_seconds": SECONDS,
        "processor_seconds": round(usage.worked, 2), "megabytes": round(megabytes, 2),
        "limit_megabytes": MEGABYTES, "peak_gigabytes": round(usage.gigabytes, 2),
    }  # fmt: skip
    print(json.dumps(told, indent=2))
    store("page", told)
    verdict([f"page: {told[name]} {name}" for name in ("seconds", "megabytes") if told[name] > told[f"limit_{name}"]])


if __name__ == "__main__":
    main()
