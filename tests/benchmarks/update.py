"""`score` and `update` beside TRL's GRPO on the same rows: tokens per second, and most memory of the process.

    .venv/bin/python tests/benchmarks/update.py [--models small large] [--rounds 2]

Both sides take the same float32 weights and rows: groups of 8 ragged responses with long tails, and one optimizer step
on all of them under GRPO with the divergence from a reference. Each side is a process of its own, the sides in turn, so
that whatever else the machine does meets both; it reads the reference and then steps, without generating, and a first
pass is not counted. TRL is installed into an environment of its own; its padding, its tiles of logits and its optimizer
are its own. Loss and gradient of the first step must agree. Exit code 1 where a goal is missed.

`bfloat16` is `this` with that as `resources.compute_dtype`, which is off unless it is asked for; there is no goal.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from measuring import ROOT, TRL, WORK, environment, side, store, verdict

GROUP = 8
SPEED, MEMORY = 1.5, 1 / 3
"""Goals: of the tokens per second at least, on each model; of the memory at most, on the large one."""

MODELS = {
    "small": {
        "rows": 256, "vocabulary": None,
        "spec": {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "ffn": 3},
    },
    "wide": {
        "rows": 64, "vocabulary": None,
        "spec": {"layers": 4, "width": 768, "heads": 12, "kv_heads": 6, "ffn": 3},
    },
    "large": {
        "rows": 32, "vocabulary": 152_000,
        "spec": {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "ffn": 2, "tied": True},
    },
}  # fmt: skip
"""0.8 million parameters with a token per character; 28 million in layers, which are what takes the time there; and 20
million of which nearly all are the vocabulary's.
"""

PLAN = {"learning_rate": 1e-6, "weight_decay": 0.0, "gradient_clip": 1.0, "clip": 0.2, "kl": 0.04}


def main() -> None:
    """Run the side that is asked for; without one, all of them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--repeats", type=int, default=2, help="counted passes in each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-batch", type=int, default=8, help="TRL's rows per micro-batch; 8 is its default")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side is None:
        compare(asked)
        return
    plan = json.loads(asked.plan.read_text(encoding="utf-8"))
    told = SIDES[asked.side](plan)
    (asked.plan.parent / f"{asked.side}.json").write_text(json.dumps(told), encoding="utf-8")


def compare(asked: argparse.Namespace) -> None:
    """Measure both sides in turn, print the table, write the results, refuse what misses a goal."""
    python = {"this": Path(sys.executable), "bfloat16": Path(sys.executable), "TRL": environment("trl", TRL)}
    found: dict[str, Any] = {}
    for name in asked.models:
        folder = WORK / "update" / name
        folder.mkdir(parents=True, exist_ok=True)
        plan = {
            **PLAN, **MODELS[name], "policy": str(folder / "policy"), "output": str(folder / "trainer"),
            "repeats": asked.repeats, "threads": asked.threads, "peer_batch": asked.peer_batch,
        }  # fmt: skip
        file = folder / "plan.json"
        file.write_text(json.dumps(plan), encoding="utf-8")
        side(python["this"], __file__, "prepare", file, asked.threads)
        sides: dict[str, list[dict[str, Any]]] = {one: [] for one in python}
        for number in range(asked.rounds):
            for one, outcomes in sides.items():
                outcomes.append(side(python[one], __file__, one, file, asked.threads))
                print(f"{name}, round {number}, {one}: {outcomes[-1]}", flush=True)
        agree(sides)
        found[name] = sides
    missed = report(found)
    store(
        "update",
        {"models": MODELS, "plan": PLAN, "threads": asked.threads, "peer_batch": asked.peer_batch, "found": found},
    )
    verdict(missed)


def agree(sides: dict[str, list[dict[str, Any]]]) -> None:
    """Both sides must take the same step, or they do not do the same work."""
    for name in ("loss", "norm"):
        ours, theirs = (sides[one][0][name] for one in ("this", "TRL"))
        if not math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-6):
            raise SystemExit(f"the first step's {name} is {ours} here and {theirs} in TRL")


def report(found: dict[str, Any]) -> list[str]:
    """Print the table; the goals that are missed."""
    missed = []
    print(f"\n{'':8} {'':8} {'update tok/s':>13} {'score tok/s':>12} {'step s':>8} {'peak GB':>8} {'rows/read':>12}")
    for name, sides in found.items():
        middle = {
            one: {
                key: statistics.median(outcome[key] for outcome in outcomes)
                for key in ("update", "score", "whole", "gigabytes", "useful")
            }
            for one, outcomes in sides.items()
        }
        for one, of in middle.items():
            print(
                f"{name:8} {one:8} {of['update']:13,.0f} {of['score']:12,.0f} {of['whole']:8.2f} "
                f"{of['gigabytes']:8.2f} {of['useful']:12.2f}"
            )
        ours, theirs = middle["this"], middle["TRL"]
        ratio = {key: ours[key] / theirs[key] for key in ours}
        print(
            f"{name:8} {'ratio':8} {ratio['update']:13.2f} {ratio['score']:12.2f} {ratio['whole']:8.2f} "
            f"{ratio['gigabytes']:8.2f}"
        )
        missed += [f"{name}: {key} {ratio[key]:.2f}, not {SPEED}" for key in ("update", "score") if ratio[key] < SPEED]
        if name == "large" and ratio["gigabytes"] > MEMORY:
            missed.append(f"{name}: memory {ratio['gigabytes']:.2f}, not {MEMORY:.2f}")
    return missed


def prepare(plan: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that both sides read; nothing where it is there already."""
    sys.path.insert(0, str(ROOT))
    from pipeline.models import checkpoint
    from pipeline.models.fresh import ModelSpec, create

    model, tokenizer = create(ModelSpec(**plan["spec"]), ["0123456789+-*= abcdefghijklmnopqrstuvwxyz"], seed=0)
    if plan["vocabulary"]:
        model.resize_token_embeddings(plan["vocabulary"], mean_resizing=False)
    checkpoint.save(model, tokenizer, Path(plan["policy"]))
    size = {"parameters": model.num_parameters(), "vocabulary": model.config.vocab_size}
    print(size)
    return size


def rows_of(plan: dict[str, Any], vocabulary: int) -> list[dict[str, Any]]:
    """Groups that share a prompt of 8 to 32 tokens; responses of 8 to 256, half of them below 48.

    Tokens from 3 on: the first three are the tokenizer's own.
    """
    drawn, rows = random.Random(0), []
    for group in range(plan["rows"] // GROUP):
        prompt = [drawn.randrange(3, vocabulary) for _ in range(drawn.randint(8, 32))]
        for sample in range(GROUP):
            length = min(256, max(8, round(drawn.lognormvariate(math.log(48), 0.8))))
            response = [drawn.randrange(3, vocabulary) for _ in range(length)]
            rows.append(
                {"prompt_id": f"{group:04d}", "sample": sample, "prompt_tokens": prompt, "response_tokens": response,
                 "advantage": drawn.gauss(0, 1)}
            )  # fmt: skip
    return rows


def ours(plan: dict[str, Any], arithmetic: Literal["float32", "bfloat16"] = "float32") -> dict[str, Any]:
    """What `score` and `update` call between reading their inputs and writing their artifacts."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import pyarrow as pa
    import torch

    from pipeline.algorithms.recipe import Recipe
    from pipeline.algorithms.weights import WEIGHTS
    from pipeline.metrics import Metrics
    from pipeline.models.checkpoint import load_policy
    from pipeline.models.distributed import shard
    from pipeline.models.forward import response_logprobs
    from pipeline.models.precision import computing
    from pipeline.packing import Packed, numbered
    from pipeline.training.batches import micro_batches
    from pipeline.training.loop import Plan, fit
    from pipeline.training.optimizer import adamw, constant
    from stages.score import read
    from stages.update import Improvement, Settings, Term

    torch.set_num_threads(plan["threads"])
    recipe = Recipe.load("grpo")
    settings = Settings.of(
        None, {"loss": recipe.loss, "update": recipe.update, "learning_rate": plan["learning_rate"]}
    )  # fmt: skip
    model = shard(computing(load_policy(Path(plan["policy"]), "float32"), arithmetic))
    rows = rows_of(plan, model.config.vocab_size)
    lengths = np.array([len(row["prompt_tokens"]) + len(row["response_tokens"]) for row in rows])
    columns = {
        name: [row[name] for row in rows] for name in ("prompt_id", "sample", "prompt_tokens", "response_tokens")
    }
    columns |= {
        "advantages": pa.array(
            [[row["advantage"]] * len(row["response_tokens"]) for row in rows], pa.list_(pa.float32())
        ),
        "correct": [row["advantage"] > 0 for row in rows],
        "finished": [True] * len(rows),
    }  # fmt: skip
    table, budget = pa.table(columns), settings.micro_batch_tokens

    def reader(reference: Any, prompts: Any, responses: Any) -> Any:
        return response_logprobs(reference, prompts, responses).logprobs

    def scoring() -> tuple[float, Any]:
        reference = shard(computing(load_policy(Path(plan["policy"]), "float32"), arithmetic))
        return timed(lambda: read(reference, reader, table, budget), plan["repeats"])

    scored, logprobs = scoring()
    scored_table = table.append_column("old_logprobs", logprobs).append_column("ref_logprobs", logprobs)
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay)
    taken: list[Metrics] = []

    def step() -> None:
        improvement = Improvement(
            scored_table, [Term.of(line) for line in settings.loss], WEIGHTS[settings.update.weights], 1.0
        )
        taken.append(Metrics("benchmark", None, "update"))
        walk = Plan([np.arange(len(rows))], budget, settings.gradient_clip)
        fit(model, improvement, optimizer, constant(0), walk, taken[-1])

    updated, _ = timed(step, plan["repeats"])
    first = {row["name"]: row["value"] for row in taken[0].rows}
    prompts, responses = columns["prompt_tokens"], columns["response_tokens"]
    computed = sum(
        Packed([prompts[row] for row in micro], [responses[row] for row in micro], torch.device("cpu")).tokens.numel()
        for micro in micro_batches(np.arange(len(rows)), lengths, budget, packed=True, groups=numbered(prompts))
    )
    return {
        **speeds(int(lengths.sum()), scored, updated, columns_read=2), "useful": int(lengths.sum()) / computed,
        "loss": first["loss/total"], "norm": first["grad/norm"],
    }  # fmt: skip


def theirs(plan: dict[str, Any]) -> dict[str, Any]:
    """TRL's own functions on a generation batch as `GRPOTrainer._prepare_inputs` makes it."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import pad, shuffle_sequence_dict, split_tensor_dict

    torch.set_num_threads(plan["threads"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(plan["policy"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(plan["policy"])
    rows, batch = rows_of(plan, model.config.vocab_size), plan["peer_batch"]
    parts = len(rows) // batch
    config = GRPOConfig(
        output_dir=plan["output"], use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=batch, gradient_accumulation_steps=parts, num_generations=GROUP,
        learning_rate=plan["learning_rate"], weight_decay=plan["weight_decay"], adam_beta2=0.95,
        max_grad_norm=plan["gradient_clip"], beta=plan["kl"], epsilon=plan["clip"], loss_type="grpo",
        num_iterations=1, report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * len(rows)), processing_class=tokenizer,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = parts
    optimizer, model = trainer.create_optimizer(), trainer.model
    prompts, responses = ([torch.tensor(row[name]) for row in rows] for name in ("prompt_tokens", "response_tokens"))
    whole = {
        "prompt_ids": pad(prompts, padding_value=tokenizer.pad_token_id, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(row) for row in prompts], padding_value=0, padding_side="left"),
        "completion_ids": pad(responses, padding_value=tokenizer.pad_token_id, padding_side="right"),
        "completion_mask": pad([torch.ones_like(row) for row in responses], padding_value=0, padding_side="right"),
        "advantages": torch.tensor([row["advantage"] for row in rows]),
    }  # fmt: skip
    tokens = torch.cat([whole["prompt_ids"], whole["completion_ids"]], dim=1)
    attended = torch.cat([whole["prompt_mask"], whole["completion_mask"]], dim=1)

    def score() -> Any:
        with torch.no_grad():
            kept = whole["completion_ids"].size(1)
            read = trainer._get_per_token_logps_and_entropies
            return read(trainer.ref_model, tokens, attended, kept, batch_size=batch)[0]

    scored, whole["ref_per_token_logps"] = timed(score, plan["repeats"])
    taken: list[tuple[float, float]] = []

    def step() -> None:
        model.train()
        loss = 0.0
        for part in split_tensor_dict(shuffle_sequence_dict(whole), parts):
            share = trainer._compute_loss(model, part)
            share.backward()
            loss += float(share.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), plan["gradient_clip"]))
        optimizer.step()
        optimizer.zero_grad()
        taken.append((loss, norm))

    updated, _ = timed(step, plan["repeats"])
    useful = int(attended.sum())
    return {
        **speeds(useful, scored, updated, columns_read=1), "useful": useful / attended.numel(), "loss": taken[0][0],
        "norm": taken[0][1],
    }  # fmt: skip


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of the passes after the first, and what the first said."""
    said, seconds = work(), []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), said


def speeds(tokens: int, scored: float, updated: float, columns_read: int) -> dict[str, float]:
    """Tokens per second of both, padding not counted, and the seconds of an iteration with so many columns to read."""
    return {
        "tokens": tokens, "score": tokens / scored, "update": tokens / updated,
        "whole": columns_read * scored + updated,
    }  # fmt: skip


SIDES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "prepare": prepare,
    "this": ours,
    "bfloat16": partial(ours, arithmetic="bfloat16"),
    "TRL": theirs,
}


if __name__ == "__main__":
    main()
