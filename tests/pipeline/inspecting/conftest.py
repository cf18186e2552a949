"""A run of three iterations and two evaluations, planted: what each named query should find is known."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline.artifacts import Outbox
from pipeline.catalog import EXPERIMENT_FILE, catalog
from pipeline.contracts import ADVANTAGES, CONTRACTS, LABELS, PROMPTS, ROLLOUTS, SCORES
from pipeline.inspecting.views import Views

PROMPT_IDS = [f"{letter * 4}" for letter in "abcdefgh"]
SAMPLES = 4


def put(path, contract, rows, inputs=None):
    """A real artifact, by the machinery that stages use."""
    outbox = Outbox(path, contract, contract.name, 1, f"{abs(hash(str(path))):064d}"[:64], {}, inputs or {})
    columns = {name for row in rows for name in row}
    outbox.write(0, pa.Table.from_pylist(rows, schema=contract.schema(columns)))
    outbox.metrics.add("reward/mean", 0.5, "reward")
    return outbox.commit()


@dataclass(frozen=True)
class Planted:
    """The run, and its rows as plain polars frames, one row a response."""

    folder: Path
    responses: pl.DataFrame
    """run, phase, iteration, all columns of rollouts, labels and scores, returns and advantages where it trains."""
    prompts: pl.DataFrame

    def loop(self) -> pl.DataFrame:
        return self.responses.filter(phase="loop")


def response(rng, phase, iteration, number, sample):
    """One row: right more often as iterations pass; prompt h is never solved, prompt a is solved and then lost."""
    prompt = PROMPT_IDS[number]
    chance = {"h": 0.0, "a": (1.0, 1.0, 0.0)[iteration], "b": (0.0, 0.3, 1.0)[iteration]}.get(prompt[0], 0.5)
    right = bool(rng.random() < chance)
    length = int(rng.integers(3, 9)) + (4 if prompt[0] == "d" else 0)
    cut = prompt[0] == "d" and sample == 1
    given = "42" if right else str(40 - number % 2 - sample % 2)
    failed = prompt[0] == "e" and sample == 2
    words = ["the", "sum", "of", "both", "is", given][: 3 + sample]
    text = " ".join([*words, "hence", "and", "so"][: len(words) + 3 * (rng.random() < iteration / 2)]) + f" {given}"
    logprobs = (-rng.random(length) * (0.2 if right else 0.8)).astype("f4")
    old = np.minimum(logprobs + (0.01 * np.arange(length)).astype("f4"), 0).astype("f4")
    kept = not failed and prompt[0] != "f"
    values = (rng.random(length) * 0.5 + (0.4 if right else 0.0)).astype("f4")
    reward = 1.0 if right else -1.0
    return {
        "phase": phase, "iteration": iteration, "prompt_id": prompt, "sample": sample,
        "prompt_tokens": [1, 2], "response_tokens": list(range(length)), "response": text,
        "sampler_logprobs": logprobs.tolist(), "finish": "length" if cut else "stop", "seed": 0,
        "staleness": min(iteration, 1),
        "reward": 0.5 if cut else 0.0 if failed else reward, "correct": None if failed else right,
        "gold": None if failed else right, "extracted": None if failed else given,
        "target": given, "verdict": "timeout" if failed else "correct" if right else "wrong",
        "vote_share": 0.25, "keep": kept, "dropped": None if kept else "no verdict" if failed else "constant outcomes",
        "old_logprobs": old.tolist(), "ref_logprobs": (old - 0.1 * (1 + iteration)).tolist(), "values": values.tolist(),
        "advantages": (values * (1 if right else -1)).tolist() if kept else None,
        "returns": [reward] * length if kept else None,
    }  # fmt: skip


FINISHED = {"shaped_reward": 0.0, "finished": True}


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Planted:
    root = tmp_path_factory.mktemp("planted") / "runs"
    rng = np.random.default_rng(7)
    asked = [
        {"prompt_id": one, "messages": [{"role": "user", "content": f"What is {one}?"}], "answer": "42",
         "grader": "exact", "source": "planted"}
        for one in PROMPT_IDS
    ]  # fmt: skip
    prompts = put(root / "base/prompts", PROMPTS, asked)
    rows = []
    for phase, iterations in (("loop", (0, 1, 2)), ("evaluation", (0, 2))):
        for iteration in iterations:
            here = [
                response(rng, phase, iteration, number, sample)
                for number in range(len(PROMPT_IDS)) for sample in range(SAMPLES)
            ]  # fmt: skip
            rows += here
            place = root / "run" / ("eval" if phase == "evaluation" else "") / f"{iteration:04d}"
            write_iteration(place, here, prompts, phase)
    candidates = [{**{n: row[n] for n in names(ROLLOUTS)}, "response": "to be ranked"} for row in rows[:8]]
    put(root / "run/0001/candidates", ROLLOUTS, candidates, {"prompts": [prompts.record()]})
    redone = [
        {name: row[name] for name in names(LABELS)} | {"verdict": "wrong", "reward": -1.0}
        for row in rows if (row["phase"], row["iteration"]) == ("loop", 1)
    ]  # fmt: skip
    put(root / "run/0001/labels-0.strict", LABELS, redone)
    (root / "run" / EXPERIMENT_FILE).write_text('name = "run"\n')
    frame = pl.DataFrame(rows, infer_schema_length=None).with_columns(run=pl.lit("run"))
    return Planted(root / "run", frame, pl.DataFrame(asked))


def names(contract):
    return [field.name for field in contract.fields]


def write_iteration(place, rows, prompts, phase):
    """The artifacts that an iteration, or an evaluation, leaves."""
    number = "-0" if phase == "loop" else ""
    made = put(
        place / f"rollouts{number}", ROLLOUTS, [{n: row[n] for n in names(ROLLOUTS)} for row in rows],
        {"prompts": [prompts.record()]},
    )  # fmt: skip
    inputs = {"rollouts": [made.record()], "prompts": [prompts.record()]}
    put(place / f"labels{number}", LABELS, [{n: row[n] for n in names(LABELS)} for row in rows], inputs)
    if phase != "loop":
        return
    scored = ("prompt_id", "sample", "old_logprobs", "ref_logprobs", "values")
    put(place / "scores", SCORES, [{n: row[n] for n in scored} for row in rows], inputs)
    trained = [{**row, **FINISHED} for row in rows if row["keep"]]
    put(place / "advantages", ADVANTAGES, [{n: row[n] for n in names(ADVANTAGES)} for row in trained], inputs)


@pytest.fixture(scope="session")
def views(planted):
    with Views(catalog([planted.folder])) as opened:
        yield opened


@pytest.fixture(scope="session")
def table_contracts():
    return [contract for contract in CONTRACTS.values() if contract.is_table]
