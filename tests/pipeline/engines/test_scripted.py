"""The scripted engine says what it is told to say."""

import json
import math

import pytest

from pipeline.engines import EngineOptions, Request, Sampling
from pipeline.engines.scripted import SCRIPTED_LOGPROB, ScriptedEngine
from pipeline.errors import EngineError

PLAN = Sampling(group_size=3, max_tokens=4, stop_ids=(1,), greedy=True)


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50, "max_position_embeddings": 100}))
    return tmp_path


def say(engine, prompts):
    return {(c.prompt, c.sample): c for c in engine.generate(Request(prompts, list(range(len(prompts)))), PLAN)}


def test_a_script_is_said_in_turn(checkpoint):
    (checkpoint / "script.json").write_text(json.dumps({"5,6": [[8, 1], [9, 9, 1]], "*": [[7, 7, 7, 7, 7, 1]]}))
    engine = ScriptedEngine(EngineOptions())
    engine.load(checkpoint)
    found = say(engine, [[5, 6], [40]])
    assert [found[0, s].tokens for s in (-1, 0, 1, 2)] == [[8, 1], [8, 1], [9, 9, 1], [8, 1]]
    assert found[0, 0].finish == "stop"
    assert found[0, 0].logprobs == [SCRIPTED_LOGPROB] * 2
    assert found[1, 0].tokens == [7, 7, 7, 7]
    assert found[1, 0].finish == "length"


def test_nothing_is_said_after_the_end_token(checkpoint):
    engine = ScriptedEngine(EngineOptions(), script=lambda prompt, sample: [2, 1, 3])
    engine.load(checkpoint)
    assert say(engine, [[5]])[0, 0].tokens == [2, 1]


def test_a_callable_sees_prompt_and_sample(checkpoint):
    engine = ScriptedEngine(EngineOptions(), script=lambda prompt, sample: [*prompt, sample + 10, 1])
    engine.load(checkpoint)
    assert say(engine, [[5, 6]])[0, 1].tokens == [5, 6, 11, 1]


def test_a_prompt_that_the_script_does_not_know_is_an_error(checkpoint):
    (checkpoint / "script.json").write_text(json.dumps({"5": [[1]]}))
    engine = ScriptedEngine(EngineOptions())
    engine.load(checkpoint)
    with pytest.raises(EngineError, match="no line for '6'"):
        say(engine, [[6]])
    assert engine.closed


def test_without_a_script_it_babbles_evenly(checkpoint):
    engine = ScriptedEngine(EngineOptions())
    engine.load(checkpoint)
    found = say(engine, [[n] for n in range(40)])
    tokens = [token for c in found.values() for token in c.tokens]
    assert set(tokens) <= set(range(50))
    assert len(set(tokens)) > 30
    assert found[0, 0].logprobs[0] == -math.log(50)


def test_it_has_nothing_to_search(checkpoint):
    engine = ScriptedEngine(EngineOptions())
    engine.load(checkpoint)
    with pytest.raises(EngineError, match="cannot search with beams"):
        engine.generate(Request([[5]], [0]), Sampling(group_size=2, beams=2, max_tokens=4, stop_ids=(1,)))
    assert len(say(engine, [[5]])) == 4
