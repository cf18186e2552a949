"""The reward model on real human preferences, beside TRL's RewardTrainer: accuracy on held-out pairs, pairs per second.

    .venv/bin/python tests/benchmarks/reward_model.py --data PAIRS.jsonl

Both train the same model (the same weights, the same new head for each seed) on the same pairs, equally often, with
the same optimizer, and are measured on the last 300 pairs, which neither ever trains on or chooses anything by. The
seeds are run in turn, ours and TRL's one after the other, so that whatever else the machine does meets both.
TRL is installed into an environment of its own.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from measuring import ROOT, TRL, WORK, environment, run, store

sys.path.insert(0, str(ROOT))

from pipeline.artifacts import METRICS_FILE, Artifact
from pipeline.models import checkpoint
from pipeline.models.fresh import ModelSpec, create
from pipeline.text import Chat
from stages.ingest import Settings as IngestSettings
from stages.ingest import ingest

TEST_PAIRS = 300

MODEL = {"layers": 1, "width": 128, "heads": 4, "kv_heads": 2, "ffn": 2, "tokenizer": "bpe", "vocab_size": 2048,
         "max_position": 4096, "init_std": 0.2}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How both sides train."""

    epochs: int = 2
    batch: int = 16
    learning_rate: float = 1e-3
    warmup_share: float = 0.1
    final_share: float = 0.1
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    tokens: int = 2048
    beta2: float = 0.95
    threads: int = 2


@dataclass(frozen=True)
class Outcome:
    """One training."""

    accuracy: float
    """On the test pairs; equal scores count one half."""
    pairs_per_second: float
    """Pairs trained on, over the seconds of the training loop."""
    peak_gigabytes: float
    """Most memory of the whole process."""


def main() -> None:
    """Prepare, train in turn, print the table, write the results."""
    asked = _arguments()
    plan = Plan(**{name: getattr(asked, name) for name in ("epochs", "learning_rate", "threads")})
    work = WORK / "reward_model"
    work.mkdir(parents=True, exist_ok=True)
    python = environment("trl", TRL)
    train, test = split(asked.data, work)
    policy = fresh_policy(work / "policy", train)
    found: dict[str, list[Outcome]] = {"this": [], "TRL": []}
    for seed in asked.seeds:
        model = fresh_start(policy, work / f"start-{seed}", seed)
        found["this"].append(ours(plan, model, train, test, work / f"ours-{seed}", seed))
        found["TRL"].append(theirs(plan, python, model, train, test, work / f"trl-{seed}", seed))
        for name, outcomes in found.items():
            print(f"seed {seed}  {name:5}  {outcomes[-1]}", flush=True)
    report(found, plan, asked.seeds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="pairs: chosen and rejected dialogues, JSONL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=Plan.epochs)
    parser.add_argument("--learning-rate", type=float, default=Plan.learning_rate)
    parser.add_argument("--threads", type=int, default=Plan.threads)
    return parser.parse_args()


def split(data: Path, work: Path) -> tuple[Artifact, Artifact]:
    """Rankings to train on, and of the last 300 pairs; a pair whose prompt is asked there as well is not trained on."""
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    test = _rankings(work, "test", lines[-TEST_PAIRS:])
    asked = set(test.table(["prompt_id"])["prompt_id"].to_pylist())
    others = _rankings(work, "others", lines[:-TEST_PAIRS]).table(["prompt_id", "messages", "responses", "ranks"])
    rows = [row for row in others.to_pylist() if row.pop("prompt_id") not in asked]
    return _rankings(work, "train", [json.dumps(row) for row in rows]), test


def _rankings(work: Path, name: str, lines: list[str]) -> Artifact:
    file = work / f"{name}.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = IngestSettings.of(None, {"kind": "rankings", "name": name})
    return ingest.run(work / f"rankings-{name}", settings, files=[file])


def fresh_policy(folder: Path, train: Artifact) -> Path:
    """A model with random weights, its tokenizer made of the training pairs."""
    rows = train.table(["messages", "responses"]).to_pylist()
    texts = [text for row in rows for text in (*(turn["content"] for turn in row["messages"]), *row["responses"])]
    model, tokenizer = create(ModelSpec(**MODEL), texts, seed=0)
    checkpoint.save(model, tokenizer, folder)
    return folder


def fresh_start(policy: Path, folder: Path, seed: int) -> Path:
    """The reward model that both sides start from: the policy's body, a new head."""
    checkpoint.save(checkpoint.fresh_reward_model(policy, seed), Chat(policy).tokenizer, folder)
    return folder


def ours(plan: Plan, model: Path, train: Artifact, test: Artifact, out: Path, seed: int) -> Outcome:
    """`rlhf stage reward` in a process of its own."""
    settings = {
        "epochs": plan.epochs, "batch": plan.batch, "learning_rate": plan.learning_rate,
        "warmup_share": plan.warmup_share, "final_share": plan.final_share, "weight_decay": plan.weight_decay,
        "gradient_clip": plan.gradient_clip, "tokens": plan.tokens, "held_out_share": 0.0, "seed": seed,
    }  # fmt: skip
    words = ["--rankings", train.path, "--held-out", test.path, "--reward-model", model, "--out", out]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    peak = run([sys.executable, "-m", "stages.reward", *words], plan.threads).gigabytes
    made = Artifact.open(out)
    numbers = {row["name"]: row["value"] for row in pq.read_table(out / METRICS_FILE).to_pylist()}
    return Outcome(made.stats["accuracy/test"], numbers["speed/pairs_per_second"], peak)


def theirs(
    plan: Plan, python: Path, model: Path, train: Artifact, test: Artifact, out: Path, seed: int
) -> Outcome:  # fmt: skip
    """TRL's trainer on the same rows, in the format its documentation asks for."""
    out.mkdir(exist_ok=True)
    files = {}
    for name, rankings in (("train", train), ("test", test)):
        files[name] = str(out / f"{name}.json")
        Path(files[name]).write_text(json.dumps([_conversation(row) for row in rankings.table().to_pylist()]))
    steps = plan.epochs * math.ceil(train.stats["rows"] / plan.batch)
    wanted = {
        **asdict(plan), **files, "model": str(model), "output": str(out / "trainer"), "seed": seed,
        "warmup_steps": round(plan.warmup_share * steps),
    }  # fmt: skip
    (out / "plan.json").write_text(json.dumps(wanted))
    script = Path(__file__).with_name("trl_reward.py")
    peak = run([python, script, out / "plan.json", out / "result.json"], plan.threads).gigabytes
    told: dict[str, Any] = json.loads((out / "result.json").read_text())
    if told["rows"]["train"] != train.stats["rows"]:
        raise SystemExit(f"TRL trained on {told['rows']['train']} pairs, not on {train.stats['rows']}")
    _refuse_other_tokens(told["first"], model, train)
    pairs = told["rows"]["train"] * plan.epochs
    return Outcome(told["accuracy"], pairs / told["seconds"], peak)


def _conversation(row: dict[str, Any]) -> dict[str, Any]:
    best = row["ranks"].index(0)
    better, worse = row["responses"][best], row["responses"][1 - best]
    return {"prompt": row["messages"], "chosen": _answer(better), "rejected": _answer(worse)}


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _refuse_other_tokens(first: dict[str, list[int]], model: Path, train: Artifact) -> None:
    """Both sides must read the same tokens, or they do not train the same model."""
    row, chat = train.table().to_pylist()[0], Chat(model)
    sides = _conversation(row)
    for name, side in (("chosen_ids", "chosen"), ("rejected_ids", "rejected")):
        text = sides[side][0]["content"]
        if first[name] != chat.prompt_tokens(row["messages"]) + chat.response_tokens(text):
            raise SystemExit(f"TRL reads other tokens of the first pair: {first[name][:20]} ...")


def report(found: dict[str, list[Outcome]], plan: Plan, seeds: list[int]) -> None:
    """The table for people, and everything for later."""
    print(f"\n{'':6} {'accuracy, mean':>15} {'spread':>8} {'pairs/s':>9} {'peak GB':>8}")
    for name, outcomes in found.items():
        accuracies = [outcome.accuracy for outcome in outcomes]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        speed = statistics.median(outcome.pairs_per_second for outcome in outcomes)
        peak = max(outcome.peak_gigabytes for outcome in outcomes)
        print(f"{name:6} {statistics.mean(accuracies):15.3f} {spread:8.3f} {speed:9.1f} {peak:8.2f}")
    ours, theirs = ([outcome.pairs_per_second for outcome in found[name]] for name in ("this", "TRL"))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"ratio of pairs per second, seed by seed: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    outcomes = {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in found.items()}
    store("reward_model", {"model": MODEL, "plan": asdict(plan), "seeds": seeds, "outcomes": outcomes})


if __name__ == "__main__":
    main()
