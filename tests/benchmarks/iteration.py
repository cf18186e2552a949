"""Whole iterations of GRPO beside TRL's GRPOTrainer, and what of an iteration is neither engine nor model.

    .venv/bin/python tests/benchmarks/iteration.py [--rounds 2] [--iterations 6]

The same 0.8M-parameter policy, trained once on demonstrations of the built-in world, samples 8 responses of up to 64
tokens to 64 prompts at temperature 1 and takes one optimizer step under GRPO with the divergence from its reference.
Responses end by themselves, with about 45 tokens on both sides; their mean is in the table.

    this      `rlhf run` of an experiment file: launcher `inline`, every file and manifest; no evaluation. It samples by
              the engine `transformers`, as TRL does, which is the faster one for a model of this size on a CPU
    vLLM      the same with the engine that is there for models of any size
    TRL 512   GRPOTrainer with `use_cpu` and its own generation, in an environment of its own: all rows at once
    TRL 8     the same with micro-batches of 8 rows, its default
    stages    `this` and `vLLM` once more, in a process whose functions are timed from outside: what an iteration
              consists of
    process   `vLLM` with a process per stage

Sides are processes of their own, in turn, on as many threads. Seconds are medians over iterations after the first:
of `this` from the times at which manifests were written, so everything between two iterations counts, and of TRL
between the ends of steps. Memory is the most that all processes of a side had at once, pages that they share counted
once; the largest process alone stands beside it. The goal of time is against the faster TRL, that of memory against the
one that holds the whole batch at once, where most of its memory is the work's and not the libraries'; the ratios to
both are printed. Exit code 1 where a goal is missed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from measuring import ROOT, TRL, WORK, environment, store, verdict

TIME, MEMORY, REST = 0.5, 0.5, 0.1
"""Goals: of TRL's seconds and gigabytes at most; of an iteration's seconds that are neither engine nor model."""
RECIPE = {"group_size": 8, "learning_rate": 1e-5, "weight_decay": 0.0, "gradient_clip": 1.0, "clip": 0.2, "kl": 0.04}
GROUPS, LONGEST = 64, 64
WHOLE_BATCH = "TRL 512"
PEERS = {WHOLE_BATCH: 512, "TRL 8": 8}
"""Rows of TRL's micro-batches."""
MICRO_BATCH_TOKENS = 4096

EXPERIMENT = f"""
recipe = "grpo"
name = "measured"
base = "iteration-base"

[recipe_changes]
grpo = {{ rollout = {{ group_size = {RECIPE["group_size"]} }} }}

[models.new]
layers = 4
width = 128
heads = 4
kv_heads = 2
ffn = 3
tokenizer = "characters"
max_position = 96

[data.world]
terms = [5, 8]
wrong_share = 0.6

[data.demonstrations]
source = "arithmetic"
count = 12000

[data.prompts]
source = "arithmetic"
split = "train"
count = 1024

[sft]
epochs = 1
batch = 32
learning_rate = 3e-3
warmup_share = 0.04
weight_decay = 0.01

[scale]
iterations = 1
groups = {GROUPS}
prompt_tokens = 32
response_tokens = {LONGEST}
learning_rate = {RECIPE["learning_rate"]}
warmup_steps = 0

[resources]
micro_batch_tokens = {MICRO_BATCH_TOKENS}
"""

ENGINES = {
    "this": (
        "pipeline.engines.transformers:_SampledBatch.__init__",
        "pipeline.engines.transformers:_SampledBatch.step",
    ),
    "vLLM": ("vllm.v1.engine.llm_engine:LLMEngine.step", "vllm.v1.engine.llm_engine:LLMEngine.add_request"),
}
"""Our sides -> functions of their engine whose seconds are sampling's."""
MODEL = ("stages.score:read", "stages.update:fit")
WHOLE, STAGE = "flows.run:Run.do", "pipeline.stage:Stage.run"
TERMS = {
    "artifacts: metrics, digests, card, manifest, disk": ("pipeline.artifacts:Outbox.commit",),
    "artifacts: check, compress, write parts": ("pipeline.artifacts:Outbox.write",),
    "inputs: digests and contracts": ("pipeline.stage:_ensure_sound",),
    "checkpoints: look at tensors": ("pipeline.models.checkpoint:inspect",),
    "checkpoints: load": ("pipeline.models.checkpoint:load_policy",),
    "checkpoints: save": ("pipeline.models.checkpoint:save",),
    "tokenizers: load": ("pipeline.text:Chat.__init__",),
    "engine: take the new weights": (
        "pipeline.engines.vllm:VllmEngine.load", "pipeline.engines.transformers:TransformersEngine.load",
    ),
    "Prefect: links to artifacts": ("flows.pictures:link",),
    "Prefect: table, curves, samples": ("flows.pictures:show",),
}  # fmt: skip
"""Terms of what is neither engine nor model -> functions whose seconds they are; none calls another of them."""


def main() -> None:
    """Run the side that is asked for; without one, all of them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--iterations", type=int, default=6, help="of each process; the first is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("stages", "TRL"), help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side is None:
        compare(asked)
        return
    plan = json.loads(asked.plan.read_text(encoding="utf-8"))
    told = {"stages": stages, "TRL": theirs}[asked.side](plan)
    (asked.plan.parent / f"{asked.side}.json").write_text(json.dumps(told), encoding="utf-8")


def compare(asked: argparse.Namespace) -> None:
    """Measure the sides in turn, print the tables, write the results, refuse what misses a goal."""
    folder = WORK / "iteration"
    folder.mkdir(parents=True, exist_ok=True)
    experiment, root = folder / "experiment.toml", folder / "runs"
    experiment.write_text(EXPERIMENT, encoding="utf-8")
    ours: list[str | Path] = ["run", experiment, "--root", root]
    if not (root / "prepared" / "0000" / "policy").exists():
        watched([sys.executable, "-m", "flows.cli", *ours, "--name", "prepared"], asked.threads)
    plan = {
        **RECIPE, "policy": str(root / "iteration-base" / "sft"), "prompts": str(root / "iteration-base" / "prompts"),
        "output": str(folder / "trainer"), "threads": asked.threads, "iterations": asked.iterations,
        "experiment": str(experiment), "root": str(root), "groups": GROUPS, "longest": LONGEST,
    }  # fmt: skip
    file = folder / "plan.json"

    def run_ours(one: str, launcher: str, count: int) -> dict[str, Any]:
        name = f"measured-{launcher}"
        shutil.rmtree(root / name, ignore_errors=True)
        changes = (f"scale.iterations={count}", f'resources.launcher="{launcher}"', engine_of(one))
        words = [*ours, "--name", name, *(word for change in changes for word in ("--set", change))]
        usage = watched([sys.executable, "-m", "flows.cli", *words], asked.threads)
        return {**written(root / name, usage["began"]), **usage}

    def run_side(python: Path, name: str, **more: Any) -> dict[str, Any]:
        file.write_text(json.dumps({**plan, **more}), encoding="utf-8")
        usage = watched([python, __file__, "--side", name, "--plan", file], asked.threads)
        return {**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), **usage}

    peer = environment("trl", TRL)
    turns: dict[str, Callable[[], dict[str, Any]]] = {
        **{one: partial(run_ours, one, "inline", asked.iterations) for one in ENGINES},
        **{one: partial(run_side, peer, "TRL", batch=batch) for one, batch in PEERS.items()},
    }
    sides = measured(turns, asked.rounds)
    inside = {one: run_side(Path(sys.executable), "stages", one=one) for one in ENGINES}
    apart = run_ours("vLLM", "process", 2)
    missed = [*report(sides), *(line for one, of in inside.items() for line in report_stages(one, of))]
    report_process(apart, inside["vLLM"])
    store("iteration", {"plan": {**RECIPE, "threads": asked.threads}, "sides": sides,
                        "stages": inside, "process": apart})  # fmt: skip
    verdict(missed)


def measured(turns: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each side told, round after round."""
    sides: dict[str, list[dict[str, Any]]] = {one: [] for one in turns}
    for number in range(rounds):
        for one, turn in turns.items():
            sides[one].append(turn())
            print(f"round {number}, {one}: {sides[one][-1]}", flush=True)
    return sides


def engine_of(one: str) -> str:
    """What tells a run which engine the side has."""
    return f'resources.engine="{"vllm" if one == "vLLM" else "transformers"}"'


def report(sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Print all sides of a whole iteration; the goals that are missed."""
    print(f"\n{'':14} {'s/iteration':>12} {'first s':>8} {'tokens/response':>16} {'GB of all':>10} {'GB of one':>10}")
    middle = {
        one: {
            "seconds": statistics.median(second for outcome in outcomes for second in outcome["seconds"]),
            "first": statistics.median(outcome["first"] for outcome in outcomes),
            "length": statistics.mean(length for outcome in outcomes for length in outcome["lengths"]),
            "together": statistics.median(outcome["together"] for outcome in outcomes),
            "largest": statistics.median(outcome["largest"] for outcome in outcomes),
        }
        for one, outcomes in sides.items()
    }
    for ours in ENGINES:
        for peer in PEERS:
            ratio = {key: value / middle[peer][key] for key, value in middle[ours].items()}
            middle[f"{ours} / {peer}"] = ratio
    for one, of in middle.items():
        print(
            f"{one:14} {of['seconds']:12.2f} {of['first']:8.1f} {of['length']:16.2f} {of['together']:10.2f} "
            f"{of['largest']:10.2f}"
        )
    print(f"{'goal':14} {TIME:12.2f} {'':8} {'':16} {MEMORY:10.2f}")
    fastest = min(PEERS, key=lambda one: middle[one]["seconds"])
    against = {"seconds": (fastest, TIME), "together": (WHOLE_BATCH, MEMORY)}
    for one in PEERS:
        if not 0.9 < (times := middle[f"this / {one}"]["length"]) < 1.1:
            raise SystemExit(f"responses are {times:.2f} times as long as those of {one}: not the same work")
    ratios = {name: middle[f"this / {peer}"][name] for name, (peer, _) in against.items()}
    return [
        f"{name} {ratios[name]:.2f} of those of {peer}, not {goal}"
        for name, (peer, goal) in against.items()
        if ratios[name] > goal
    ]


def report_stages(one: str, inside: Mapping[str, Any]) -> list[str]:
    """Print what an iteration under `inline` consists of; the goals that are missed."""
    print(f"\n{one:12} {'seconds':>8} {'engine':>8} {'model':>8} {'Prefect':>8} {'rest':>8}")
    whole = inside["iteration"]
    for name, of in {**inside["stages"], "between": inside["between"], "iteration": whole}.items():
        rest = of["seconds"] - of["engine"] - of["model"] - of["prefect"]
        print(f"{name:12} {of['seconds']:8.3f} {of['engine']:8.3f} {of['model']:8.3f} {of['prefect']:8.3f} {rest:8.3f}")
    share = 1 - (whole["engine"] + whole["model"]) / whole["seconds"]
    print(f"neither engine nor model: {share:.1%}, goal {REST:.0%}; of that, seconds of an iteration:")
    for name, seconds in sorted(inside["terms"].items(), key=lambda item: -item[1]):
        print(f"  {seconds:7.3f}  {name}")
    return [f"{one}: orchestration {share:.1%} of an iteration, not {REST:.0%}"] if share > REST else []


def report_process(apart: Mapping[str, Any], inside: Mapping[str, Any]) -> None:
    """Print the seconds of an iteration with a process per stage; there is no goal for them."""
    whole, compute = statistics.median(apart["seconds"]), inside["iteration"]["engine"] + inside["iteration"]["model"]
    print(f"\n{'process':12} {'seconds':>8} {'of start':>9}")
    for name, of in apart["stages"].items():
        print(f"{name:12} {of['wall']:8.2f} {of['wall'] - of['own']:9.2f}")
    print(f"{'iteration':12} {whole:8.2f}; {whole - compute:.2f} more than engine and model take under inline")


def watched(words: Sequence[str | Path], threads: int) -> dict[str, float]:
    """Run a process to its end; most gigabytes of it and all its children at once, and of the largest of them."""
    there = os.environ | {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    began, log = time.time(), WORK / "iteration" / "said.txt"
    most = {"together": 0.0, "largest": 0.0}
    with log.open("wb") as said:
        child = subprocess.Popen(
            [str(word) for word in words], cwd=ROOT, env=there, stdout=said, stderr=subprocess.STDOUT
        )
        watcher = threading.Thread(target=_watch, args=(child, most))
        watcher.start()
        child.wait()
        watcher.join()
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {child.returncode}\n{log.read_text()[-4000:]}")
    return {**most, "began": began, "process_seconds": time.time() - began}


def _watch(child: "subprocess.Popen[bytes]", most: dict[str, float]) -> None:
    """Look four times a second: proportional set sizes, in which a page that several share counts once."""
    while child.poll() is None:
        sizes = []
        try:
            for process in (whole := psutil.Process(child.pid), *whole.children(recursive=True)):
                sizes.append(_gigabytes(process.pid))
        except psutil.NoSuchProcess:
            continue
        most["together"] = max(most["together"], sum(sizes))
        most["largest"] = max(most["largest"], *sizes)
        time.sleep(0.25)


def _gigabytes(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e9


def written(run: Path, began: float) -> dict[str, Any]:
    """Seconds of a run's iterations, and the mean length of their responses, from its manifests alone."""
    ended = began
    seconds, lengths, stages = [], [], {}
    for folder in sorted(run.glob("[0-9]*")):
        manifests = {path.parent.name: path for path in folder.glob("*/manifest.json")}
        before = ended
        for name, path in sorted(manifests.items(), key=lambda item: item[1].stat().st_mtime_ns):
            now, stats = path.stat().st_mtime, json.loads(path.read_bytes())["stats"]
            stages[name] = {"wall": now - before, "own": stats["seconds"]}
            before = now
            if "length/mean" in stats:
                lengths.append(stats["length/mean"])
        seconds.append(before - ended)
        ended = before
    return {"first": seconds[0], "seconds": seconds[1:], "lengths": lengths, "stages": stages}


class Clock:
    """Seconds inside functions, added up by name and by the stage that was being made."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.stage = "between"

    def around(self, name: str, place: str, stage_of: Callable[..., str] | None = None) -> None:
        """Replace `module:attribute` by itself with a clock; everywhere that it was imported to, too."""
        module, _, path = place.partition(":")
        owner: Any = import_module(module)
        *above, last = path.split(".")
        for part in above:
            owner = getattr(owner, part)
        inner = getattr(owner, last)

        @wraps(inner)
        def outer(*given: Any, **named: Any) -> Any:
            before = self.stage
            if stage_of is not None:
                self.stage = stage_of(*given, **named)
            started = time.perf_counter()
            try:
                return inner(*given, **named)
            finally:
                self.spent[name][self.stage] += time.perf_counter() - started
                self.stage = before

        setattr(owner, last, outer)
        if not above:
            for other in list(sys.modules.values()):
                if getattr(other, "__dict__", {}).get(last) is inner:
                    setattr(other, last, outer)


def stages(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the iterations of a run consist of, on average over those after the first."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from flows import execute, pictures

    clock = Clock()
    marks: list[tuple[float, dict[str, dict[str, float]]]] = []
    clock.around("whole", WHOLE, lambda run, stage, *_, **__: str(stage.name))
    clock.around("stage", STAGE)
    for name, places in {"engine": ENGINES[plan["one"]], "model": MODEL, **TERMS}.items():
        for place in places:
            clock.around(name, place)
    show = pictures.show

    def mark(run: Any, number: int) -> None:
        show(run, number)
        marks.append((time.perf_counter(), {name: dict(spent) for name, spent in clock.spent.items()}))

    pictures.show = mark
    root = Path(plan["root"])
    shutil.rmtree(root / "measured-stages", ignore_errors=True)
    changes = [f"scale.iterations={plan['iterations']}", engine_of(plan["one"])]
    execute.run_experiment(plan["experiment"], None, "measured-stages", changes, str(root))
    (began, before), (ended, after) = marks[0], marks[-1]
    count = len(marks) - 1

    def mean(name: str, stage: str) -> float:
        return float(after.get(name, {}).get(stage, 0.0) - before.get(name, {}).get(stage, 0.0)) / count

    told = {
        stage: {
            "seconds": mean("whole", stage), "engine": mean("engine", stage), "model": mean("model", stage),
            "prefect": mean("whole", stage) - mean("stage", stage),
        }
        for stage in after["whole"]
        if mean("whole", stage)
    }  # fmt: skip
    iteration = {key: sum(of[key] for of in told.values()) for key in ("seconds", "engine", "model", "prefect")}
    whole = (ended - began) / count
    between = {"seconds": whole - iteration["seconds"], "engine": 0.0, "model": 0.0, "prefect": 0.0}
    return {
        "stages": told, "between": between, "iteration": {**iteration, "seconds": whole},
        "terms": {name: sum(mean(name, stage) for stage in after.get(name, {})) for name in TERMS},
    }  # fmt: skip


def theirs(plan: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's GRPOTrainer, from its own generation to its optimizer step."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    started = time.perf_counter()
    torch.set_num_threads(plan["threads"])
    parts = sorted(Path(plan["prompts"]).glob("part-*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part, columns=["messages", "answer"]).to_pylist()]
    asked = [
        {"prompt": [{key: turn[key] for key in ("role", "content")} for turn in row["messages"]],
         "answer": row["answer"]}
        for row in rows
    ]  # fmt: skip
    responses = plan["groups"] * plan["group_size"]
    config = GRPOConfig(
        output_dir=plan["output"], use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=plan["batch"], gradient_accumulation_steps=responses // plan["batch"],
        num_generations=plan["group_size"], max_completion_length=plan["longest"], temperature=1.0,
        learning_rate=plan["learning_rate"], lr_scheduler_type="constant", weight_decay=plan["weight_decay"],
        adam_beta2=0.95, max_grad_norm=plan["gradient_clip"], beta=plan["kl"], epsilon=plan["clip"],
        loss_type="grpo", num_iterations=1, max_steps=plan["iterations"], logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip

    def right(completions: Sequence[Sequence[Mapping[str, str]]], answer: Sequence[str], **_: Any) -> list[float]:
        said = [one[0]["content"].rpartition(";")[2].strip() for one in completions]
        return [float(found == wanted) for found, wanted in zip(said, answer, strict=True)]

    ends: list[float] = []

    class Ends(TrainerCallback):
        """Note when each optimizer step is over."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(plan["policy"], dtype=torch.float32), reward_funcs=right,
        args=config, train_dataset=Dataset.from_list(asked), callbacks=[Ends()],
        processing_class=AutoTokenizer.from_pretrained(plan["policy"]),
    )  # fmt: skip
    trainer.train()
    logged = [line for line in trainer.state.log_history if "completions/mean_length" in line]
    return {
        "first": ends[0] - started, "seconds": [after - before for before, after in pairwise(ends)],
        "lengths": [line["completions/mean_length"] for line in logged], "rewards": [line["reward"] for line in logged],
    }  # fmt: skip


if __name__ == "__main__":
    main()
