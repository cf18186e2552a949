"""The engine that says what it is told to say: real files in, real responses out, no model.

A checkpoint may hold `script.json`, which maps the prompt's token ids, joined by commas, to a list of responses
(`"*"` stands for every other prompt); sample s says response s modulo their number, and greedy says the first:

    {"5,6,7": [[8, 9, 1], [8, 1]], "*": [[3, 1]]}

A checkpoint without a script babbles: every token is drawn evenly from the vocabulary of its `config.json`.
It has no distribution to search, so it refuses beams.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pipeline.engines import (
    GREEDY,
    Completion,
    EngineOptions,
    Request,
    Sampling,
    check_request,
    ensure_open,
    fatal,
    response_seed,
)
from pipeline.errors import EngineError

SCRIPTED_LOGPROB = -math.log(2)

Script = Callable[[Sequence[int], int], Sequence[int]]


class ScriptedEngine:
    """Says the checkpoint's script, or `script(prompt, sample)` where one is handed over."""

    def __init__(self, options: EngineOptions, script: Script | None = None) -> None:
        self.options = options
        self.closed = False
        self._told = script
        self._script = script
        self._vocab_size = 0
        self._max_model_len = 0

    def load(self, checkpoint: Path) -> None:
        """Read `config.json` and, unless a callable was handed over, `script.json` where there is one."""
        ensure_open(self)
        with fatal(self, "reading the script", checkpoint):
            config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
            self._vocab_size = int(config["vocab_size"])
            self._max_model_len = self.options.max_model_len or int(config["max_position_embeddings"])
            script = checkpoint / "script.json"
            if self._told is None:
                self._script = _written(script) if script.exists() else None

    def generate(self, request: Request, plan: Sampling, then: Request | None = None) -> Iterator[Completion]:
        """Yield the groups in the order of the prompts."""
        ensure_open(self)
        check_request(request, plan, vocab_size=self._vocab_size, max_model_len=self._max_model_len)
        if plan.beams is not None:
            raise EngineError(
                "the scripted engine cannot search with beams: its responses have no probabilities",
                do="name another engine (resources.engine), or leave beams out",
            )
        asked = enumerate(zip(request.prompts, request.seeds, strict=True))
        return self._say([(i, prompt, seed) for i, (prompt, seed) in asked if i not in request.done], plan)

    def describe(self) -> dict[str, str]:
        """No arithmetic, so no dtype."""
        return {"engine": "scripted", "version": "1", "dtype": "none", "logprobs_mode": "constant"}

    def sleep(self) -> None:
        """Hold on to nothing, as always."""

    def close(self) -> None:
        """Refuse to say anything more."""
        self.closed = True

    def _say(self, prompts: list[tuple[int, Sequence[int], int]], plan: Sampling) -> Iterator[Completion]:
        for index, prompt, first_seed in prompts:
            for sample in plan.samples:
                seed = response_seed(first_seed, sample)
                with fatal(self, "saying the script", f"prompt {index}"):
                    if self._script is None:
                        told = self._babble(prompt, seed, plan, greedy=sample == GREEDY)
                        logprob = -math.log(self._vocab_size)
                    else:
                        told = list(self._script(prompt, sample))
                        logprob = SCRIPTED_LOGPROB
                    tokens, finish = _cut(told, plan)
                yield Completion(index, sample, tokens, [logprob] * len(tokens), finish, seed)

    def _babble(self, prompt: Sequence[int], seed: int, plan: Sampling, *, greedy: bool) -> list[int]:
        source = random.Random(str(list(prompt)) if greedy else f"{list(prompt)} {seed}")  # noqa: S311, not a secret
        return [source.randrange(self._vocab_size) for _ in range(plan.max_tokens)]


def _written(path: Path) -> Script:
    lines = json.loads(path.read_text(encoding="utf-8"))

    def script(prompt: Sequence[int], sample: int) -> list[int]:
        key = ",".join(map(str, prompt))
        responses = lines.get(key, lines.get("*"))
        if not responses:
            raise EngineError(f"the script has no line for {key!r} and none for '*'", where=str(path))
        return list(responses[max(sample, 0) % len(responses)])

    return script


def _cut(told: list[int], plan: Sampling) -> tuple[list[int], Literal["stop", "length"]]:
    """Cut after the first end token and at `max_tokens`; what does not reach an end token counts as cut by length."""
    for position, token in enumerate(told[: plan.max_tokens]):
        if token in plan.stop_ids:
            return told[: position + 1], "stop"
    return told[: plan.max_tokens], "length"
