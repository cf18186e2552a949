"""`label` and `advantage` on many rows; our advantage pieces beside verl's functions; math grading and its cache.

    .venv/bin/python tests/benchmarks/credit.py [--rows 10000 100000 1000000] [--data FILE]

Rollouts are planted: groups of 16 responses of 64 tokens, whose votes `label` counts and whose credit `advantage`
centres and whitens, each a process of its own, its start included. verl is installed into an environment of its own;
its side and ours take the same arrays, in turn, and must agree. `--rows 10000000` shows that memory stays (about 10 GB
of disk). `--data` is a JSON or JSONL file of problems with `answer`: sixteen responses to each are graded, by one
process and by two, once and again. Exit code 1 where a goal is missed.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import ROOT, WORK, environment, run, side, store, verdict

sys.path.insert(0, str(ROOT))

TOKENS, GROUP, SHARD = 64, 16, 16_384
SECONDS, GIGABYTES = 60.0, 1.5
"""Goals for a million rows: both stages together, and each process."""
GROWTH = 1.5
"""Goal: seconds per row of the most rows, over those of a tenth of them."""
FASTER = 20.0
"""Goal: how many times as fast as verl's functions."""
VERL = ("torch==2.13.0 numpy", "--no-deps verl==0.9.1", "tensordict<=0.10.0 omegaconf ray codetiming transformers<5.11")
RECIPE = {
    "label": ["label.kind=majority_vote"],
    "advantage": ["advantage.kind=group_mean", "normalize.kind=whiten"],
}


def main() -> None:
    """Run the side that is asked for; without one, everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="of the stages")
    parser.add_argument("--arrays", type=int, default=65_536, help="rows of the arrays beside verl's functions")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--keep", action="store_true", help="leave the planted rollouts for another time")
    parser.add_argument("--data", type=Path, help="file of problems with `answer`: grade responses to them")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side is not None:
        told = SIDES[asked.side](json.loads(asked.plan.read_text(encoding="utf-8")))
        (asked.plan.parent / f"{asked.side}.json").write_text(json.dumps(told), encoding="utf-8")
        return
    found: dict[str, Any] = {}
    missed = []
    if asked.rows:
        found["stages"] = stages(sorted(asked.rows), keep=asked.keep)
        missed += told_stages(found["stages"])
    if asked.arrays:
        found["functions"] = functions(asked.arrays, asked.rounds)
        missed += told_functions(found["functions"])
    if asked.data is not None:
        found["grading"] = graded(asked.data.resolve())
        missed += told_grading(found["grading"])
    store("credit", found)
    verdict(missed)


def stages(sizes: list[int], *, keep: bool) -> dict[str, Any]:
    """Seconds, seconds of processors and gigabytes of both stages for each number of rows."""
    found: dict[str, Any] = {}
    for rows in sizes:
        folder = WORK / "credit" / str(rows)
        if not (folder / "rollouts").exists():
            # In a process of its own: the memory of a stage counts from that of the process that starts it.
            planting = multiprocessing.get_context("spawn").Process(target=plant, args=(folder, rows))
            planting.start()
            planting.join()
        for name in ("labels", "advantages"):
            shutil.rmtree(folder / name, ignore_errors=True)
        given = ["--rollouts", folder / "rollouts"]
        found[str(rows)] = {
            "label": stage("label", [*given, "--prompts", folder / "prompts", "--out", folder / "labels"]),
            "advantage": stage("advantage", [*given, "--labels", folder / "labels", "--out", folder / "advantages"]),
        }
        print(rows, found[str(rows)], flush=True)
        if not keep:
            shutil.rmtree(folder)
    return found


def stage(name: str, words: list[str | Path]) -> dict[str, float]:
    """A stage as its users start it."""
    settings = [word for one in RECIPE[name] for word in ("--set", one)]
    return run([sys.executable, "-m", f"stages.{name}", *words, *settings])._asdict()


def plant(folder: Path, rows: int) -> None:
    """Prompts, and rollouts whose answers disagree."""
    import pyarrow as pa

    from pipeline.artifacts import Outbox
    from pipeline.contracts import PROMPTS, ROLLOUTS

    ids = [f"{number:016x}" for number in range(rows // GROUP)]
    prompts = Outbox(folder / "prompts", PROMPTS, "prompts", 1, "p" * 16, {}, {})
    for part, start in enumerate(range(0, len(ids), SHARD)):
        some = ids[start : start + SHARD]
        asked = [{"prompt_id": name, "messages": [{"role": "user", "content": name}], "answer": "7", "grader": "exact",
                  "source": "planted"} for name in some]  # fmt: skip
        prompts.write(part, pa.Table.from_pylist(asked, schema=PROMPTS.schema()))
    prompts.commit()
    rollouts = Outbox(folder / "rollouts", ROLLOUTS, "rollouts", 1, "r" * 16, {}, {})
    random = np.random.default_rng(0)
    for part, start in enumerate(range(0, len(ids) * GROUP, SHARD)):
        names = np.repeat(ids[start // GROUP : (start + SHARD) // GROUP], GROUP)
        count = len(names)
        tokens = random.integers(0, 1000, (count, TOKENS), dtype=np.int32)
        ends = np.arange(0, tokens.size + 1, TOKENS, dtype=np.int32)
        rows_of = {
            "prompt_id": names, "sample": np.tile(np.arange(GROUP, dtype=np.int32), count // GROUP),
            "prompt_tokens": pa.ListArray.from_arrays(ends // 8, tokens[:, :8].ravel()),
            "response_tokens": pa.ListArray.from_arrays(ends, tokens.ravel()),
            "response": [f"1+2=3;{answer}" for answer in random.integers(5, 9, count)],
            "sampler_logprobs": pa.ListArray.from_arrays(ends, -random.random(tokens.size, dtype=np.float32)),
            "finish": ["stop"] * count, "seed": np.arange(count),
        }  # fmt: skip
        rollouts.write(part, pa.table(rows_of))
    rollouts.commit()


def told_stages(found: dict[str, Any]) -> list[str]:
    """Print the table; the goals that are missed."""
    missed = []
    print(f"\n{'rows':>10} {'label s':>8} {'GB':>5} {'advantage s':>12} {'GB':>5} {'both s':>8} {'us a row':>9}")
    for rows, of in found.items():
        both = of["label"]["seconds"] + of["advantage"]["seconds"]
        first, second = of["label"], of["advantage"]
        print(
            f"{int(rows):10,} {first['seconds']:8.2f} {first['gigabytes']:5.2f} {second['seconds']:12.2f} "
            f"{second['gigabytes']:5.2f} {both:8.2f} {both / int(rows) * 1e6:9.1f}"
        )
        most = max(of[name]["gigabytes"] for name in of)
        if most > GIGABYTES:
            missed.append(f"{int(rows):,} rows: {most:.2f} GB, not {GIGABYTES}")
        if int(rows) <= 1_000_000 and both > SECONDS:
            missed.append(f"{int(rows):,} rows: {both:.1f} s, not {SECONDS:.0f}")
    spent = {int(rows): (of["label"]["seconds"] + of["advantage"]["seconds"]) / int(rows) for rows, of in found.items()}
    growth = [spent[rows] / spent[rows // 10] for rows in spent if rows // 10 in spent and rows >= 1_000_000]
    if growth and max(growth) > GROWTH:
        missed.append(f"seconds per row grow by {max(growth):.2f} over ten times the rows, not {GROWTH}")
    print(f"goal for a million: {SECONDS:.0f} s, {GIGABYTES} GB; a row at most {GROWTH} times as long as in a tenth")
    return missed


def functions(rows: int, rounds: int) -> dict[str, Any]:
    """Seconds of each function on both sides, middle of their turns, and how far apart the results are."""
    python = {"ours": Path(sys.executable), "verl": environment("verl", VERL)}
    folder = WORK / "credit" / "arrays"
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"rows": rows, "folder": str(folder)}), encoding="utf-8")
    turns: dict[str, list[dict[str, Any]]] = {"ours": [], "verl": []}
    for _ in range(rounds):
        for name, outcomes in turns.items():
            outcomes.append(side(python[name], __file__, name, plan))
    found = {}
    for name, piece in PEERS.items():
        ours = statistics.median(outcome["seconds"][piece] for outcome in turns["ours"])
        theirs = statistics.median(outcome["seconds"][name] for outcome in turns["verl"])
        a, b = (np.load(folder / f"{label}.npy") for label in (f"ours-{piece}", f"verl-{name}"))
        found[name] = {"ours": ours, "verl": theirs, "piece": piece, "apart": float(np.abs(a - b).max())}
    shutil.rmtree(folder)
    return {"rows": rows, "tokens": TOKENS, "found": found}


def told_functions(found: dict[str, Any]) -> list[str]:
    """Print the table; the goals that are missed. Raises `SystemExit` where results differ."""
    print(f"\n{found['rows']:,} rows of {found['tokens']} tokens")
    print(f"{'':54} {'verl ms':>9} {'ours ms':>8} {'ratio':>7} {'apart':>8}")
    missed = []
    for name, of in found["found"].items():
        ratio = of["verl"] / of["ours"]
        print(f"{name:54} {of['verl'] * 1e3:9.1f} {of['ours'] * 1e3:8.1f} {ratio:7.1f} {of['apart']:8.0e}")
        if of["apart"] > TOLERANCE:
            raise SystemExit(f"{name}: the results are {of['apart']:.1e} apart, so it is not the same work")
        if ratio < FASTER:
            missed.append(f"{name}: {ratio:.1f} times as fast, not {FASTER:.0f}")
    return missed


def graded(data: Path) -> dict[str, Any]:
    """Seconds of grading by one process and by two, anew and again with what the process then knows."""
    folder = WORK / "credit" / "grading"
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    found = {}
    for workers in (1, 2):
        plan.write_text(json.dumps({"data": str(data), "workers": workers}), encoding="utf-8")
        found[str(workers)] = side(Path(sys.executable), __file__, "grading", plan)
    shutil.rmtree(folder)
    return found


def told_grading(found: dict[str, Any]) -> list[str]:
    """Print the table; the goals that are missed."""
    print(f"\n{'processes':>9} {'responses':>10} {'pairs':>7} {'start s':>8} {'anew s':>7} {'again s':>8}")
    for workers, of in found.items():
        spent = f"{of['start']:8.2f} {of['anew']:7.2f} {of['again']:8.2f}"
        print(f"{workers:>9} {of['responses']:10,} {of['pairs']:7,} {spent}")
    faster = found["1"]["anew"] / found["2"]["anew"]
    print(f"two processes are {faster:.2f} times as fast as one; goal: {CORES}")
    return [] if faster >= CORES else [f"two grading processes: {faster:.2f} times as fast as one, not {CORES}"]


CORES = 1.6
"""Goal: how many times as fast two grading processes are as one, on two cores."""


def grading(plan: dict[str, Any]) -> dict[str, Any]:
    """Judge responses to real problems: right ones in several spellings, and answers of other problems."""
    from pipeline.grading import judge

    text = Path(plan["data"]).read_text(encoding="utf-8")
    problems = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    references = [str(problem["answer"]).rpartition("####")[2].strip() for problem in problems]
    random = np.random.default_rng(0)
    responses, wanted = [], []
    for number, reference in enumerate(references):
        others = [references[other] for other in random.integers(0, len(references), 3)]
        drawn = random.choice([reference, reference, f"{{{reference}}}", *others], GROUP)
        responses += [
            f"Step {number}.{sample}: so the answer is \\boxed{{{answer}}}." for sample, answer in enumerate(drawn)
        ]
        wanted += [reference] * GROUP
    workers = plan["workers"]
    started = time.perf_counter()
    judge("math", ["A: 1"] * workers, [str(number) for number in range(workers)], workers=workers)
    start = time.perf_counter() - started
    anew, first = timed_once(lambda: judge("math", responses, wanted, workers=workers))
    others = [f"Once more. {response}" for response in responses]  # other words, the same answers
    again, second = timed_once(lambda: judge("math", others, wanted, workers=workers))
    if first != second:
        raise SystemExit("the same answers were judged in two ways")
    pairs = len({(one.extracted, reference) for one, reference in zip(first, wanted, strict=True)})
    return {
        "responses": len(responses), "pairs": pairs, "start": start, "anew": anew, "again": again,
        "right": sum(bool(one.correct) for one in first),
    }  # fmt: skip


def timed_once(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returns."""
    started = time.perf_counter()
    made = call()
    return time.perf_counter() - started, made


TOLERANCE = 2e-4
"""Largest difference of a credit whose deviation is 1: verl sums float32 where we sum float64."""


def arrays(rows: int) -> dict[str, np.ndarray]:
    """Ragged responses with values and a reward at their end, in groups of 16; the greedy rewards of their prompts."""
    random = np.random.default_rng(0)
    lengths = random.integers(TOKENS // 4, TOKENS + 1, rows)
    mask = np.arange(TOKENS) < lengths[:, None]
    rewards = np.zeros((rows, TOKENS), np.float32)
    rewards[np.arange(rows), lengths - 1] = (random.random(rows) < 0.5) + random.random(rows) / 8
    values = np.where(mask, random.random((rows, TOKENS)), 0).astype(np.float32)
    greedy = np.repeat((random.random(rows // GROUP) < 0.5).astype(np.float32), GROUP)
    return {"rewards": rewards, "values": values, "mask": mask, "greedy": greedy, "group": np.arange(rows) // GROUP}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of three calls, and what it returns: the first one warms up."""
    several = [timed_once(call) for _ in range(3)]
    return min(seconds for seconds, _ in several), several[-1][1]


def ours(plan: dict[str, Any]) -> dict[str, Any]:
    """The pieces, as the stage calls them."""
    from pipeline.algorithms.advantages import gae, greedy_baseline, group_mean, leave_one_out, reward_to_go
    from pipeline.algorithms.normalizers import group_std, whiten

    given = arrays(plan["rows"])
    rewards, values, mask, greedy, group = (given[name] for name in ("rewards", "values", "mask", "greedy", "group"))
    calls = {
        "gae, whiten": lambda: whiten(gae(rewards, values, mask, gamma=1.0, lam=0.95).advantages, mask),
        "group_mean, group_std": lambda: group_std(group_mean(rewards, mask, group).advantages, mask, group),
        "leave_one_out": lambda: leave_one_out(rewards, mask, group).advantages,
        "reward_to_go, whiten": lambda: whiten(reward_to_go(rewards, mask).advantages, mask),
        "group_mean, whiten": lambda: whiten(group_mean(rewards, mask, group).advantages, mask),
        "greedy_baseline": lambda: greedy_baseline(rewards, mask, greedy, credit="to_go").advantages,
    }
    return measured("ours", calls, mask, plan, lambda made: made)


def verl(plan: dict[str, Any]) -> dict[str, Any]:
    """verl's functions on tensors of the same rows. Masks are numbers there; groups are numbers here as well."""
    import torch
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo import core_algos

    given = arrays(plan["rows"])
    rewards, values, greedy = (torch.from_numpy(given[name]) for name in ("rewards", "values", "greedy"))
    mask, group = torch.from_numpy(given["mask"].astype(np.float32)), given["group"]
    config = AlgoConfig(gamma=1.0)
    grouped = {"token_level_rewards": rewards, "response_mask": mask, "index": group}
    arguments: dict[str, dict[str, Any]] = {
        "compute_gae_advantage_return":
            {"token_level_rewards": rewards, "values": values, "response_mask": mask, "gamma": 1.0, "lam": 0.95},
        "compute_reinforce_plus_plus_outcome_advantage":
            {"token_level_rewards": rewards, "response_mask": mask, "config": config},
        "compute_remax_outcome_advantage":
            {"token_level_rewards": rewards, "reward_baselines": greedy, "response_mask": mask},
    }  # fmt: skip
    calls = {name: lambda name=name: getattr(core_algos, name)(**arguments.get(name, grouped))[0] for name in PEERS}
    return measured("verl", calls, given["mask"], plan, lambda made: made.numpy())


PEERS = {
    "compute_gae_advantage_return": "gae, whiten",
    "compute_grpo_outcome_advantage": "group_mean, group_std",
    "compute_grpo_vectorized_outcome_advantage": "group_mean, group_std",
    "compute_rloo_outcome_advantage": "leave_one_out",
    "compute_rloo_vectorized_outcome_advantage": "leave_one_out",
    "compute_reinforce_plus_plus_outcome_advantage": "reward_to_go, whiten",
    "compute_reinforce_plus_plus_baseline_outcome_advantage": "group_mean, whiten",
    "compute_remax_outcome_advantage": "greedy_baseline",
}
"""verl's function -> the pieces that make the same of the same rows."""


def measured(
    label: str, calls: dict[str, Callable[[], Any]], mask: np.ndarray, plan: dict[str, Any],
    plain: Callable[[Any], np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    """Seconds of each call; what each made lies in the plan's folder, 0 where the mask is."""
    seconds = {}
    for name, call in calls.items():
        seconds[name], made = timed(call)
        np.save(Path(plan["folder"]) / f"{label}-{name}.npy", np.where(mask, plain(made), 0))
    return {"seconds": seconds}


SIDES = {"ours": ours, "verl": verl, "grading": grading}

if __name__ == "__main__":
    main()
