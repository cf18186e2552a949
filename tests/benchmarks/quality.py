"""Seconds until 3 of 4 held-out sums are right: `rlhf run` with GRPO beside TRL's GRPOTrainer.

    .venv/bin/python tests/benchmarks/quality.py [--seeds 0 1 2] [--steps 16] [--fresh [SIDE ...]]

Both sides start from the same SFT policy, which errs on purpose, and take the same prompts in the same order, samples,
learning rate and one optimizer step per batch; each generates by its own means. They are processes of their own, in
turn. Nothing is evaluated while they run: both leave the weights of every step, here as the run does anyway, there
outside the clock, and afterwards one judge samples the same held-out prompts from each with the same engine and seeds.
Finished pairs of side and seed are kept in .benchmarks/quality and not run again. Exit code 1 where a goal is missed.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from measuring import ROOT, TRL, WORK, environment, rlhf, side, store, verdict, where

HERE = WORK / "quality"
BASE = HERE / "base"
GROUPS, GROUP = 64, 8
PROMPTS = 4000
GOAL = 0.5
"""Of TRL's seconds at most, as the median over seeds."""

PLAN = {
    "learning_rate": 2e-4, "warmup": 4, "kl": 0.04, "clip": 0.2, "weight_decay": 0.0, "gradient_clip": 1.0,
    "prompt_tokens": 16, "response_tokens": 48,
}  # fmt: skip

WORLD = """
[data.world]
terms       = [3, 5]
largest     = 9
wrong_share = 0.6
"""
"""Of flows/experiments/arithmetic.toml."""

SCALE = f"""
[scale]
iterations      = 1
groups          = {GROUPS}
prompt_tokens   = {PLAN["prompt_tokens"]}
response_tokens = {PLAN["response_tokens"]}
learning_rate   = {PLAN["learning_rate"]}
warmup_steps    = {PLAN["warmup"]}
weight_decay    = {PLAN["weight_decay"]}
gradient_clip   = {PLAN["gradient_clip"]}

[recipe_changes]
grpo = {{ rollout = {{ group_size = {GROUP} }} }}
"""

FOUNDATIONS = f"""
recipe = "grpo"
{WORLD}
[models.new]                       # 0.8 million parameters, one token per character
layers       = 4
width        = 128
heads        = 4
kv_heads     = 2
ffn          = 3
tokenizer    = "characters"
max_position = 64

[data.demonstrations]
source = "arithmetic"
count  = 24000

[data.prompts]
source = "arithmetic"
split  = "train"
count  = {PROMPTS}

[data.held_out]
source = "arithmetic"
split  = "held_out"
count  = 256

[sft]
epochs        = 1
batch         = 32
learning_rate = 3e-3
warmup_share  = 0.04
weight_decay  = 0.01
{SCALE}
"""

LOOP = f"""
recipe = "grpo"

[models]
policy = "{BASE / "sft"}"

[sft]
enabled = false

[data.prompts]
artifact = "{BASE / "prompts"}"

[resources]
engine = "transformers"            # as TRL; on a CPU it is the faster one for a model of this size
{SCALE}
"""
"""Without held-out prompts: nothing is evaluated on the clock."""


def main() -> None:
    """Run the side that is asked for; without one, all of them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16, help="after which a side is given up")
    parser.add_argument("--every", type=int, default=1, help="steps between two policies that are judged")
    parser.add_argument("--quality", type=float, default=0.75, help="held-out accuracy that is to be reached")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-batch", type=int, default=64, help="TRL's rows per micro-batch")
    parser.add_argument("--fresh", nargs="*", choices=["this", "TRL"], help="run these again, both where none is named")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side is None:
        compare(asked)
        return
    told = SIDES[asked.side](json.loads(asked.plan.read_text(encoding="utf-8")))
    (asked.plan.parent / f"{asked.side}.json").write_text(json.dumps(told), encoding="utf-8")


def compare(asked: argparse.Namespace) -> None:
    """Run what is not there yet, print the table, keep the results, refuse a missed goal."""
    python = environment("trl", TRL)
    foundations()
    again = [] if asked.fresh is None else asked.fresh or list(RUNS)
    found: dict[str, dict[str, Any]] = {}
    for seed in asked.seeds:
        for name, walk in RUNS.items():
            found[f"{name} {seed}"] = told = finished(name, seed, asked, walk, python, fresh=name in again)
            print(f"{name}, seed {seed}: {line(told)}", flush=True)
        agree(found[f"this {seed}"], found[f"TRL {seed}"])
    missed = report(asked, found)
    store("quality", {"plan": PLAN, "groups": GROUPS, "group": GROUP, "quality": asked.quality, "found": found})
    verdict(missed)


def foundations() -> None:
    """The data and the policy that both sides start from; nothing where they are there already."""
    HERE.mkdir(parents=True, exist_ok=True)
    file = HERE / "foundations.toml"
    file.write_text(FOUNDATIONS, encoding="utf-8")
    (HERE / "loop.toml").write_text(LOOP, encoding="utf-8")
    for part in ("prompts", "held_out", "demonstrations"):
        rlhf("stage", "ingest", "--experiment", file, "--set", f"part={part}", "--out", BASE / part)
    rlhf(
        "stage", "sft", "--experiment", file, "--demonstrations", BASE / "demonstrations", "--out", BASE / "sft"
    )  # fmt: skip


def finished(
    name: str, seed: int, asked: argparse.Namespace, walk: Callable[..., dict[str, Any]], python: Path, *, fresh: bool
) -> dict[str, Any]:
    """What one side took with a seed and how good it became: from an earlier call, or now."""
    asked_of = {
        **PLAN, "foundations": FOUNDATIONS, "loop": LOOP, "steps": asked.steps, "every": asked.every,
        "quality": asked.quality, "threads": asked.threads, **({"batch": asked.peer_batch} if name == "TRL" else {}),
    }  # fmt: skip
    about = hashlib.sha256(json.dumps(asked_of).encode()).hexdigest()[:16]
    file = HERE / f"{name}-{seed}.json"
    if file.exists() and not fresh:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if told["about"] == about:
            return told
    folder = HERE / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    told = walk(folder, seed, asked, python)
    plan = {"policies": [str(BASE / "sft"), *told.pop("policies")], "folder": str(folder), "threads": asked.threads,
            "quality": asked.quality, "every": asked.every}  # fmt: skip
    judged = side(Path(sys.executable), __file__, "judge", planned(folder, plan), asked.threads)
    told = {"about": about, "commit": where()["commit"], **told, "accuracy": judged["accuracy"]}
    told["step"] = reached(told["accuracy"], asked.quality)
    file.write_text(json.dumps(told), encoding="utf-8")
    shutil.rmtree(folder)
    return told


def planned(folder: Path, plan: dict[str, Any]) -> Path:
    """The file of a plan."""
    file = folder / "plan.json"
    file.write_text(json.dumps(plan), encoding="utf-8")
    return file


def reached(accuracy: dict[str, float], quality: float) -> int | None:
    """The first step whose policy is good enough; None where none is."""
    return next((int(step) for step, value in accuracy.items() if value >= quality), None)


def here(folder: Path, seed: int, asked: argparse.Namespace, python: Path) -> dict[str, Any]:
    """The command that a person would type. What a step took is when its policy was whole."""
    launched = time.time()
    usage = rlhf(
        "run", HERE / "loop.toml", "--name", "run", "--root", folder, "--set", f"seed={seed}",
        "--set", f"scale.iterations={asked.steps}", threads=asked.threads,
    )  # fmt: skip
    steps = sorted(path for path in (folder / "run").iterdir() if path.name.isdigit())
    first = steps[0] / "rollouts-0" / "manifest.json"
    began = first.stat().st_mtime - json.loads(first.read_text(encoding="utf-8"))["stats"]["seconds"]
    ends = [(step / "policy" / "manifest.json").stat().st_mtime for step in steps]
    return {
        "start": began - launched, "seconds": [end - began for end in ends], "gigabytes": usage.gigabytes,
        "policies": [str(step / "policy") for step in steps], **beginning(steps[0] / "rollouts-0"),
    }  # fmt: skip


def beginning(rollouts: Path) -> dict[str, Any]:
    """What was asked first, and how long the responses were."""
    import pyarrow.parquet as pq

    table = pq.read_table(rollouts / "part-00000.parquet", columns=["prompt_tokens", "response_tokens"]).to_pydict()
    asked = [tokens for row, tokens in enumerate(table["prompt_tokens"]) if row % GROUP == 0]
    return {"prompts": asked, "length": statistics.mean(map(len, table["response_tokens"]))}


def there(folder: Path, seed: int, asked: argparse.Namespace, python: Path) -> dict[str, Any]:
    """TRL in its own environment."""
    plan = {
        **PLAN, "seed": seed, "steps": asked.steps, "batch": asked.peer_batch, "threads": asked.threads,
        "folder": str(folder), "rows": in_order(seed, asked.steps),
    }  # fmt: skip
    file = planned(folder, plan)
    launched = time.time()
    told = side(python, __file__, "trainer", file, asked.threads)
    return {"start": told.pop("began") - launched, **told}


def in_order(seed: int, steps: int) -> list[dict[str, Any]]:
    """The prompts as the run takes them, with their answers."""
    import pyarrow.parquet as pq

    sys.path.insert(0, str(ROOT))
    from stages.rollout import stream

    table = pq.read_table(BASE / "prompts" / "part-00000.parquet", columns=["messages", "answer"]).to_pylist()
    return [
        {"prompt": table[place]["messages"], "answer": table[place]["answer"]}
        for place in stream(len(table), 0, steps * GROUPS, seed)
    ]


def trainer(plan: dict[str, Any]) -> dict[str, Any]:
    """TRL's GRPOTrainer. What it takes to save the weights of a step is not counted."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(plan["threads"])
    folder, responses = Path(plan["folder"]), GROUPS * GROUP
    model = AutoModelForCausalLM.from_pretrained(BASE / "sft", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE / "sft")
    first: dict[str, Any] = {}

    def correct(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **_: Any) -> list[float]:
        if not first:
            asked = tokenizer.apply_chat_template(
                prompts[::GROUP], add_generation_prompt=True, tokenize=True, return_dict=False
            )  # fmt: skip
            first.update(prompts=asked, length=statistics.mean(map(len, completion_ids)))
        said = [completion[0]["content"].rpartition(";")[2].strip() for completion in completions]
        return [float(text == wanted) for text, wanted in zip(said, answer, strict=True)]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.saving: list[float] = [0.0]
            self.ends: list[float] = []
            self.policies: list[str] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            started = time.time()
            self.ends.append(started)
            policy = folder / f"step-{len(self.ends)}"
            model.save_pretrained(policy)
            tokenizer.save_pretrained(policy)
            self.policies.append(str(policy))
            self.saving.append(time.time() - started)

    config = GRPOConfig(
        output_dir=str(folder / "trainer"), use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=plan["batch"], gradient_accumulation_steps=responses // plan["batch"],
        num_generations=GROUP, max_completion_length=plan["response_tokens"], max_steps=plan["steps"],
        temperature=1.0, loss_type="grpo", beta=plan["kl"], epsilon=plan["clip"], num_iterations=1,
        max_grad_norm=plan["gradient_clip"], shuffle_dataset=False, seed=plan["seed"], report_to=[],
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), plan["learning_rate"], betas=(0.9, 0.95), weight_decay=plan["weight_decay"]
    )  # fmt: skip
    rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (plan["warmup"] + 1)))
    clock = Clock()
    made = GRPOTrainer(
        model=model, reward_funcs=correct, args=config, train_dataset=Dataset.from_list(plan["rows"]),
        processing_class=tokenizer, callbacks=[clock], optimizers=(optimizer, rising),
    )  # fmt: skip
    began = time.time()
    made.train()
    saved = accumulate(clock.saving)
    seconds = [end - began - before for end, before in zip(clock.ends, saved, strict=False)]
    return {"began": began, "seconds": seconds, "policies": clock.policies, **first}


def judge(plan: dict[str, Any]) -> dict[str, Any]:
    """Share of right answers over 8 samples to each held-out prompt, policy by policy until one is good enough."""
    sys.path.insert(0, str(ROOT))
    from pipeline.algorithms.shelf import Line
    from stages.label import Settings as LabelSettings
    from stages.label import label
    from stages.rollout import Settings as RolloutSettings
    from stages.rollout import rollout

    held_out, accuracy = BASE / "held_out", {}
    sampling = RolloutSettings(
        group_size=8, prompt_tokens=PLAN["prompt_tokens"], response_tokens=PLAN["response_tokens"], draw="judge"
    )  # fmt: skip
    for step in range(0, len(plan["policies"]), plan["every"]):
        folder = Path(plan["folder"]) / "judged" / str(step)
        rollouts = rollout.run(
            folder / "rollouts", sampling, prompts=held_out, policy=Path(plan["policies"][step])
        )  # fmt: skip
        labels = label.run(
            folder / "labels", LabelSettings(label=Line(kind="verifier")), rollouts=rollouts.path, prompts=held_out
        )  # fmt: skip
        accuracy[str(step)] = labels.stats["accuracy/mean"]
        if accuracy[str(step)] >= plan["quality"]:
            break
    return {"accuracy": accuracy}


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Both sides must start alike, or they do not do the same work."""
    if ours["prompts"] != theirs["prompts"]:
        raise SystemExit("the sides were asked different prompts")
    if abs(ours["length"] / theirs["length"] - 1) > 0.05:
        raise SystemExit(f"the first responses have {ours['length']:.1f} tokens here and {theirs['length']:.1f} in TRL")


def line(told: dict[str, Any]) -> str:
    """A side's way in one line."""
    values = " ".join(f"{value:.3f}" for value in told["accuracy"].values())
    return f"step {told['step']}, start {told['start']:.1f} s, {told['seconds'][-1]:.1f} s in all; {values}"


def report(asked: argparse.Namespace, found: dict[str, dict[str, Any]]) -> list[str]:
    """Print the table; the goals that are missed."""
    print(f"\nseconds to a held-out accuracy of {asked.quality}: {GROUPS} prompts x {GROUP} samples a step")
    print(f"{'':12} {'steps':>6} {'a step s':>9} {'seconds':>9} {'start s':>8} {'with start':>11} {'peak GB':>8}")
    ratios: dict[str, list[float]] = {"seconds": [], "with start": [], "a step": []}
    missed = []
    for seed in asked.seeds:
        row = {name: taken(found[f"{name} {seed}"]) for name in RUNS}
        for name, of in row.items():
            missed += [f"{name}, seed {seed}: {asked.quality} not reached in {asked.steps} steps"] * (
                of["steps"] is None
            )
            steps = of["steps"] or f">{asked.steps}"
            print(
                f"{name:5} {seed:>6} {steps:>6} {of['a step']:9.2f} {of['seconds']:9.1f} {of['start']:8.1f} "
                f"{of['with start']:11.1f} {of['GB']:8.2f}"
            )
        for key, values in ratios.items():
            values.append(row["this"][key] / row["TRL"][key])
    middle = {key: statistics.median(values) for key, values in ratios.items()}
    print(
        f"{'ratio':12} {'':>6} {middle['a step']:9.2f} {middle['seconds']:9.2f} {'':>8} {middle['with start']:11.2f} "
        f"{'':>8}  goal: seconds at most {GOAL}"
    )  # fmt: skip
    if middle["seconds"] > GOAL:
        missed.append(f"{middle['seconds']:.2f} of TRL's seconds, not {GOAL}")
    return missed


def taken(told: dict[str, Any]) -> dict[str, Any]:
    """Seconds until it was good enough, or of everything where it never was."""
    seconds, steps = told["seconds"], told["step"]
    until = seconds[(len(seconds) if steps is None else max(1, steps)) - 1]
    return {
        "steps": steps, "seconds": until, "start": told["start"], "with start": until + told["start"],
        "a step": (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1), "GB": told["gigabytes"],
    }  # fmt: skip


RUNS: dict[str, Callable[..., dict[str, Any]]] = {"this": here, "TRL": there}
SIDES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"trainer": trainer, "judge": judge}


if __name__ == "__main__":
    main()
