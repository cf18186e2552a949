"""The `rollout` stage beside a bare loop over `vllm.LLM.generate`: tokens per second, and what loading weights costs.

    .venv/bin/python tests/benchmarks/rollout.py [--prompts 64 512] [--rounds 6]

Both take the same prompts, seeds and settings on the same running engine, in turn inside one process, its prefix cache
emptied before each turn; they must say the same tokens. The stage leaves a whole artifact on disk; the loop keeps
nothing. Loading the weights, which the loop never does, is a column of its own: it is all that the next iteration's
engine costs, and has its own goal. Then: a run of two iterations counts how often an engine is built, and an engine
that was handed other weights is compared with one that was built with them. Exit code 1 where a goal is missed.
"""

import argparse
import copy
import json
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from measuring import ROOT, WORK, side, store, verdict

sys.path.insert(0, str(ROOT))

HERE = WORK / "rollout"
GROUP, PROMPT, RESPONSE = 8, 16, 64
SHARE, START = 0.95, 1.0
"""Goals: of the loop's tokens per second at least; seconds of a load at most."""
SPEC = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "ffn": 3, "max_position": 512}
LONG = 300
"""Tokens of the prompts that are asked again after a load: more than two blocks of the cache."""

RUN = f"""
recipe = "grpo"

[recipe_changes]
grpo = {{ rollout = {{ group_size = 4 }} }}

[models]
policy = "{HERE / "policy-0"}"

[sft]
enabled = false

[data.prompts]
artifact = "{HERE / "prompts"}"

[data.held_out]
source = "arithmetic"
split  = "held_out"
count  = 16

[scale]
iterations      = 2
groups          = 8
prompt_tokens   = {PROMPT}
response_tokens = 16
learning_rate   = 1e-4
"""


def main() -> None:
    """Run the side that is asked for; without one, everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side is not None:
        told = SIDES[asked.side](json.loads(asked.plan.read_text(encoding="utf-8")))
        (asked.plan.parent / f"{asked.side}.json").write_text(json.dumps(told), encoding="utf-8")
        return
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)

    def told_by(name: str, **plan: Any) -> dict[str, Any]:
        file = HERE / "plan.json"
        file.write_text(json.dumps(plan), encoding="utf-8")
        return side(Path(sys.executable), __file__, name, file, asked.threads)

    told_by("prepare", prompts=max(asked.prompts))
    speed = {str(count): told_by("speed", prompts=count, rounds=asked.rounds) for count in asked.prompts}
    found = {
        "speed": speed, "run": told_by("run"), "loaded": told_by("loaded"), "built": told_by("built"),
    }  # fmt: skip
    missed = report(found)
    store("rollout", {"threads": asked.threads, "group": GROUP, "response_tokens": RESPONSE, "spec": SPEC, **found})
    verdict(missed)


def prepare(plan: dict[str, Any]) -> dict[str, Any]:
    """Prompts, and two policies of one shape."""
    from pipeline.models import checkpoint
    from pipeline.models.fresh import ModelSpec, create
    from stages.ingest import Settings, ingest

    for seed in (0, 1):
        model, tokenizer = create(ModelSpec(**SPEC), ["0123456789+=,;abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP"], seed)
        checkpoint.save(model, tokenizer, HERE / f"policy-{seed}")
    ingest.run(
        HERE / "prompts", Settings(kind="prompts", source="arithmetic", split="train", count=plan["prompts"]), files=[]
    )
    return {}


def speed(plan: dict[str, Any]) -> dict[str, Any]:
    """Turns of the stage, of the loop, and of the loop without log-probabilities; then where a turn's time goes."""
    from pipeline.engines import EngineOptions, open_engine
    from pipeline.engines.vllm import VllmEngine

    options = EngineOptions(dtype="float32", max_model_len=PROMPT + RESPONSE)
    with timed({"LLM": (VllmEngine, "_build")}) as building:
        seconds, engine = clocked(open_engine, "vllm", HERE / "policy-0", options)
    asked, tokens = requests(plan["prompts"])
    turns: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(plan["rounds"] + 1):
        for name, turn in each(engine, plan["prompts"], number, asked, tokens).items():
            if number:  # the first turn warms up
                turns[name].append(turn)
    parts = taken_apart(plan["prompts"])
    return {"start": {"seconds": seconds, "LLM": building["LLM"]}, "turns": turns, "parts": parts}


def requests(prompts: int) -> tuple[list[tuple[Any, Any]], list[list[int]]]:
    """What the stage asks its engine for, and what it is told."""
    from pipeline.engines.vllm import VllmEngine

    with noted(VllmEngine, "_add") as asked:
        path = stage(prompts, f"{prompts}-requests")
    return asked, responses(path)


def each(
    engine: Any, prompts: int, number: int, asked: list[tuple[Any, Any]], tokens: list[list[int]]
) -> dict[str, dict[str, float]]:
    """A turn of the stage, and of the loop on the same requests with and without log-probabilities; who begins changes.

    The stage was seen to be up to a twentieth slower where it always began.
    """
    from pipeline.engines.vllm import VllmEngine

    def of_stage() -> dict[str, float]:
        with timed({"load": (VllmEngine, "load")}) as loading:
            turn, path = turn_of(stage, prompts, f"{prompts}-{number}")
        refuse_other(responses(path), "stage")
        return {**turn, **loading}

    def of_loop(**other: Any) -> dict[str, float]:
        turn, said = turn_of(loop, engine, asked, **other)
        refuse_other(said, "loop")
        return turn

    def refuse_other(said: list[list[int]], who: str) -> None:
        if said != tokens:
            raise SystemExit(f"the {who} said other tokens than the stage did before")

    sides: list[tuple[str, Callable[[], dict[str, float]]]] = [
        ("stage", of_stage), ("loop", of_loop),
        ("loop, no log-probabilities", lambda: of_loop(logprobs=None, flat_logprobs=False)),
    ]  # fmt: skip
    turns = {}
    for name, take in (sides[number % 3 :] + sides[: number % 3])[:: 1 if number % 2 else -1]:
        engine._llm.reset_prefix_cache()
        turns[name] = {**take(), "tokens": sum(map(len, tokens))}
    return turns


def stage(prompts: int, turn: str) -> Path:
    """The artifact of a sampling, always of the same one."""
    from stages.rollout import Settings, rollout

    sampling = Settings(
        group_size=GROUP, count=prompts, prompt_tokens=PROMPT, response_tokens=RESPONSE, draw="measured"
    )  # fmt: skip
    return rollout.run(HERE / "turns" / turn, sampling, prompts=HERE / "prompts", policy=HERE / "policy-0").path


def loop(engine: Any, asked: list[tuple[Any, Any]], **other: Any) -> list[list[int]]:
    """The bare loop: the tokens of all responses, and nothing else of them."""
    requests, parameters = zip(*asked, strict=True)
    parameters = tuple(copy.copy(one) for one in parameters)
    for one in parameters:
        for name, value in other.items():
            setattr(one, name, value)
    outputs = engine._llm.generate(list(requests), list(parameters), use_tqdm=False)
    return [list(response.token_ids) for output in outputs for response in output.outputs]


END = 1
"""The end token of the characters' tokenizer."""


def responses(path: Path) -> list[list[int]]:
    """The tokens of all responses, as they lie on disk."""
    from pipeline.artifacts import Artifact

    said: list[list[int]] = Artifact.open(path).table(["response_tokens"])["response_tokens"].to_pylist()
    return said


@contextmanager
def noted(owner: Any, attribute: str) -> Iterator[list[tuple[Any, ...]]]:
    """What a method is called with, `self` left out."""
    calls: list[tuple[Any, ...]] = []
    method = getattr(owner, attribute)

    def noting(self: Any, *given: Any) -> Any:
        calls.append(given)
        return method(self, *given)

    with patch.object(owner, attribute, noting):
        yield calls


def taken_apart(prompts: int) -> dict[str, float]:
    """Seconds of one turn of the stage by what they are spent on. Clocks cost microseconds a call."""
    import pyarrow.parquet as pq
    from vllm.v1.engine.llm_engine import LLMEngine

    import pipeline.artifacts
    import stages.rollout
    from pipeline.artifacts import Outbox
    from pipeline.contracts import Contract
    from pipeline.engines import vllm
    from pipeline.journal import Journal
    from pipeline.text import Chat

    watched = {
        "load": (vllm.VllmEngine, "load"), "submit": (vllm.VllmEngine, "_submit"), "engine steps": (LLMEngine, "step"),
        "decode": (Chat, "decode"), "journal": (Journal, "add"), "tokenizer": (Chat, "__init__"),
        "tokenizer's digest": (Chat, "metadata"), "check": (Contract, "check"), "conform": (Contract, "conform"),
        "Parquet": (pq, "write_table"), "fsync": (pipeline.artifacts, "flush"),
        "digest": (pipeline.artifacts._hash_of, "_make"), "measures": (stages.rollout, "_measure"),
        "commit": (Outbox, "commit"), "rows": (stages.rollout.Sampler, "_rows"),
    }  # fmt: skip
    with timed(watched) as spent:
        whole, _ = clocked(stage, prompts, f"{prompts}-parts")
    inner = ("submit", "engine steps", "decode", "journal")
    spent["rows, Arrow"] = spent.pop("rows") - sum(spent[name] for name in inner)
    return {"whole": whole, **spent, "rest": whole - sum(spent.values())}


def clocked(work: Callable[..., Any], *given: Any, **named: Any) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    made = work(*given, **named)
    return time.perf_counter() - started, made


def turn_of(work: Callable[..., Any], *given: Any, **named: Any) -> tuple[dict[str, float], Any]:
    """Seconds of a turn, those of the processors among them, and what came of it."""
    worked = time.process_time()
    seconds, made = clocked(work, *given, **named)
    return {"seconds": seconds, "worked": time.process_time() - worked, "load": 0.0}, made


@contextmanager
def timed(watched: dict[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Sum up the seconds in which functions ran, by name."""
    spent = dict.fromkeys(watched, 0.0)

    def watching(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent[name] += time.perf_counter() - started

        return run

    with ExitStack() as stack:
        for name, (owner, attribute) in watched.items():
            stack.enter_context(patch.object(owner, attribute, watching(name, getattr(owner, attribute))))
        yield spent


def two_iterations(plan: dict[str, Any]) -> dict[str, Any]:
    """`rlhf run`, evaluations and all, with every load of the engine noted."""
    from flows.cli import app
    from pipeline.engines.vllm import VllmEngine

    del plan
    file = HERE / "two.toml"
    file.write_text(RUN, encoding="utf-8")
    built, loads = [], []
    build, load = VllmEngine._build, VllmEngine.load

    def building(self: Any, checkpoint: Path) -> None:
        built.append(str(checkpoint))
        build(self, checkpoint)

    def loading(self: Any, checkpoint: Path) -> None:
        loads.append(clocked(load, self, checkpoint)[0])

    with patch.object(VllmEngine, "_build", building), patch.object(VllmEngine, "load", loading):
        app(["run", str(file), "--root", str(HERE / "runs")], standalone_mode=False)
    return {"built": len(built), "loads": loads}


def asked_twice() -> list[list[int]]:
    """Prompts that begin alike over two blocks of the prefix cache."""
    shared = [5 + place * place % 40 for place in range(LONG - 8)]
    return [[*shared, *(5 + (7 * prompt + place) % 40 for place in range(8))] for prompt in range(16)]


def said(engine: Any, sampling: Any) -> dict[str, Any]:
    """Greedy tokens and their log-probabilities, and the tokens that the prefix cache had."""
    from vllm import SamplingParams

    from pipeline.engines import Request

    prompts = asked_twice()
    of = sorted(engine.generate(Request(prompts, list(range(len(prompts)))), sampling), key=lambda one: one.prompt)
    again = engine._llm.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts], SamplingParams(max_tokens=1, detokenize=False),
        use_tqdm=False,
    )  # fmt: skip
    cached = sum(output.num_cached_tokens or 0 for output in again)
    return {"tokens": [one.tokens for one in of], "logprobs": [one.logprobs for one in of], "cached": cached}


def opened(policy: int) -> tuple[Any, Any]:
    """An engine that was built with a policy, and the plan of a greedy response."""
    from pipeline.engines import EngineOptions, Sampling, open_engine

    engine = open_engine("vllm", HERE / f"policy-{policy}", EngineOptions(dtype="float32", max_model_len=512))
    return engine, Sampling(group_size=0, greedy=True, max_tokens=32, stop_ids=(END,))


def loaded(plan: dict[str, Any]) -> dict[str, Any]:
    """An engine built with one policy, asked, handed the other and asked again; then without emptying the cache."""
    del plan
    engine, sampling = opened(0)
    before = said(engine, sampling)
    seconds = [clocked(engine.load, HERE / f"policy-{number % 2}")[0] for number in (1, 0, 1)]
    after = said(engine, sampling)
    engine.load(HERE / "policy-0")
    said(engine, sampling)
    with patch.object(type(engine._llm), "reset_prefix_cache", lambda _: True):
        engine.load(HERE / "policy-1")
    return {"before": before, "after": after, "unreset": said(engine, sampling), "loads": seconds}


def built(plan: dict[str, Any]) -> dict[str, Any]:
    """An engine built with the other policy."""
    del plan
    engine, sampling = opened(1)
    return said(engine, sampling)


def report(found: dict[str, Any]) -> list[str]:
    """Print the tables; the goals that are missed."""
    missed = compared(found["speed"])
    print("\nwhere one turn of the stage goes, milliseconds")
    for prompts, told in found["speed"].items():
        print(f"{prompts:>8} " + ", ".join(f"{name} {1000 * spent:.1f}" for name, spent in told["parts"].items()))
        start = told["start"]
        print(f"{'':8} engine started in {start['seconds']:.1f} s, vLLM's own part {start['LLM']:.1f} s")
    return missed + started_once(found["run"], found["loaded"]["loads"]) + as_fresh(found["loaded"], found["built"])


def compared(speed: dict[str, Any]) -> list[str]:
    """The stage beside the loop."""
    missed = []
    print(
        f"\n{GROUP} samples of up to {RESPONSE} tokens to each prompt; medians of turns, shares of what the loop does"
    )
    print(f"{'prompts':>8} {'':28} {'tokens/s':>9} {'share':>7} {'with load':>10} {'by processors':>14} {'seconds':>8}")
    for prompts, told in speed.items():
        for name, of in told["turns"].items():
            rate = statistics.median(turn["tokens"] / (turn["seconds"] - turn["load"]) for turn in of)
            pairs = list(zip(of, told["turns"]["loop"], strict=True))
            share = statistics.median(base["seconds"] / (turn["seconds"] - turn["load"]) for turn, base in pairs)
            whole, worked = (
                statistics.median(base[key] / turn[key] for turn, base in pairs) for key in ("seconds", "worked")
            )
            seconds = statistics.median(turn["seconds"] for turn in of)
            print(f"{prompts:>8} {name:28} {rate:9,.0f} {share:7.3f} {whole:10.3f} {worked:14.3f} {seconds:8.2f}")
            if name == "stage" and share < SHARE:
                missed.append(f"{prompts} prompts: {share:.3f} of the loop's tokens per second, not {SHARE}")
    return missed


def started_once(run: dict[str, Any], loads: list[float]) -> list[str]:
    """How often an engine was built, and what later loads took."""
    later = [*run["loads"][1:], *loads]
    print(f"\nengines built in a run of two iterations and two evaluations: {run['built']}, loads: {len(run['loads'])}")
    print(f"a later load takes {statistics.median(later):.3f} s, at most {max(later):.3f} (goal {START})")
    missed = [f"{run['built']} engines built in a run"] if run["built"] != 1 else []
    return [*missed, f"a load of {max(later):.2f} s"] if max(later) > START else missed


def as_fresh(loaded: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """Whether an engine that was handed weights says what one says that was built with them."""
    after, stale = loaded["after"], loaded["unreset"]
    same = {name: after[name] == fresh[name] for name in ("tokens", "logprobs")}
    print(f"after a load, as a fresh engine: {same}; prefix cache in use: {after['cached']} tokens of {16 * LONG}")
    print(f"control, cache not emptied: as a fresh engine: {stale['logprobs'] == fresh['logprobs']}")
    missed = [] if all(same.values()) else ["an engine that was handed weights says something else than a fresh one"]
    if after["cached"] == 0 or stale["logprobs"] == fresh["logprobs"] or loaded["before"]["tokens"] == after["tokens"]:
        missed.append("the check of the prefix cache shows nothing")
    return missed


SIDES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "prepare": prepare, "speed": speed, "run": two_iterations, "loaded": loaded, "built": built,
}  # fmt: skip


if __name__ == "__main__":
    main()
