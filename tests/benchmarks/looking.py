"""Looking at data at scale: `rlhf show` on one million rollouts, `rlhf sql` over ten million labels of 100 iterations.

    .venv/bin/python tests/benchmarks/looking.py [--keep FOLDER]

The datasets are planted: real artifacts under real contracts, responses of 64 tokens. Each command is a process of its
own, its start included; the second of two turns counts (files are then in memory). Exit code 1 beyond a limit.
"""

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from measuring import ROOT, rlhf, store, verdict

sys.path.insert(0, str(ROOT))

from pipeline.artifacts import Outbox
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.contracts import LABELS, ROLLOUTS, Contract

TOKENS, GROUP, SHARD = 64, 16, 50_000
SHOW, SQL = (2.0, 300), (3.0, None)
"""Limits: seconds of the whole command, and megabytes of memory."""

STATEMENTS = {
    "mean reward": "select iteration, avg(reward) from labels group by all order by all",
    "verdicts": "select iteration, verdict, count(*) from labels group by all order by all",
    "quantiles": "select iteration, quantile_cont(reward, [0.1, 0.5, 0.9]) from labels group by all order by all",
}


def grow(path: Path, contract: Contract, rows: int, make) -> None:
    """An artifact of so many rows, written in parts; its number in its name."""
    outbox = Outbox(path, contract, contract.name, 1, path.parent.name.ljust(16, "0"), {}, {})
    for part, start in enumerate(range(0, rows, SHARD)):
        outbox.write(part, make(start, min(SHARD, rows - start)))
    outbox.commit()


def keys(start: int, count: int) -> dict:
    """Groups of 16 that stand together."""
    numbers = np.arange(start, start + count)
    ids = np.char.mod("%016x", numbers[::GROUP] // GROUP)
    return {"prompt_id": np.repeat(ids, GROUP)[:count], "sample": (numbers % GROUP).astype(np.int32)}


def rollouts(start: int, count: int) -> pa.Table:
    """Responses of 64 tokens."""
    random = np.random.default_rng(start)
    tokens = random.integers(0, 32_000, (count, TOKENS), dtype=np.int32)
    ends = np.arange(0, tokens.size + 1, TOKENS, dtype=np.int32)
    logprobs = -random.random(tokens.size, dtype=np.float32)
    asked = pa.ListArray.from_arrays(np.arange(0, 8 * count + 1, 8, dtype=np.int32), tokens[:, :8].ravel())
    return pa.table(
        {
            **keys(start, count), "prompt_tokens": asked,
            "response_tokens": pa.ListArray.from_arrays(ends, tokens.ravel()),
            "response": [" ".join(map(str, row)) for row in tokens.tolist()],
            "sampler_logprobs": pa.ListArray.from_arrays(ends, logprobs), "finish": ["stop"] * count,
            "seed": np.arange(count),
        }
    )  # fmt: skip


def labels(start: int, count: int) -> pa.Table:
    """Verdicts and rewards."""
    random = np.random.default_rng(start)
    right = random.random(count) < 0.5
    answers = pa.array(np.char.mod("%d", random.integers(0, 100, count)))
    return pa.table(
        {
            **keys(start, count), "reward": (right + random.standard_normal(count) / 10).astype(np.float32),
            "correct": right, "gold": right, "extracted": answers, "target": answers,
            "verdict": np.where(right, "correct", "wrong"), "vote_share": pa.nulls(count, pa.float32()),
            "keep": np.ones(count, dtype=bool), "dropped": pa.nulls(count, pa.string()),
        }
    )  # fmt: skip


def plant(folder: Path, rows: int, labelled: int) -> None:
    """The rollouts, and the run with the labels; what is there already is used again."""
    run = folder / "run"
    if not (run / EXPERIMENT_FILE).exists():
        grow(folder / "many/rollouts", ROLLOUTS, rows, rollouts)
        for iteration in range(100):
            grow(run / f"{iteration:04d}/labels-0", LABELS, labelled // 100, labels)
        (run / EXPERIMENT_FILE).write_text('name = "run"\n', encoding="utf-8")


def measure(words: list[str]) -> tuple[float, float]:
    """Seconds and megabytes of `rlhf` with these words, the second time."""
    rlhf(*words)
    usage = rlhf(*words)
    return usage.seconds, usage.gigabytes * 1000


def main() -> None:
    """Plant, measure, print, refuse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--labels", type=int, default=10_000_000)
    parser.add_argument("--keep", type=Path, help="where the data stays; a temporary folder when absent")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        # In a process of its own: the memory of a command counts from that of the process that starts it.
        planting = multiprocessing.get_context("spawn").Process(
            target=plant, args=(folder, asked.rollouts, asked.labels)
        )
        planting.start()
        planting.join()
        many, run = folder / "many/rollouts", folder / "run"
        commands = {
            f"show, {asked.rollouts:,} rollouts": (["show", str(many)], SHOW),
            "show --where on them": (["show", str(many), "--where", "prompt_id = '00000000000000ff'"], SHOW),
        } | {
            f"sql, {name}, {asked.labels:,} labels": (["sql", str(run), statement], SQL)
            for name, statement in STATEMENTS.items()
        }
        found = {name: (*measure(words), *limits) for name, (words, limits) in commands.items()}
    print(f"{'':45} {'seconds':>8} {'limit':>6} {'MB':>6} {'limit':>6}")
    for name, (seconds, megabytes, most_seconds, most_megabytes) in found.items():
        print(f"{name:45} {seconds:8.2f} {most_seconds:6.1f} {megabytes:6.0f} {most_megabytes or '':>6}")
    store("looking", {"found": found})
    beyond = [name for name, (s, m, most, limit) in found.items() if s > most or m > (limit or m)]
    verdict([f"{name}: {found[name][0]:.2f} s, {found[name][1]:.0f} MB" for name in beyond])


if __name__ == "__main__":
    main()
