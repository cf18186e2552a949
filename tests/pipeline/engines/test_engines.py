"""Settings of sampling, and how open_engine keeps one engine warm."""

import json

import pytest
from pydantic import ValidationError

from pipeline.engines import EngineOptions, Request, Sampling, close_engines, open_engine
from pipeline.errors import EngineError, ExperimentError


@pytest.fixture(autouse=True)
def cold():
    close_engines()
    yield
    close_engines()


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50, "max_position_embeddings": 100}))
    return tmp_path


def test_an_unknown_engine_is_refused_with_the_names_of_all(checkpoint):
    with pytest.raises(ExperimentError, match="'sglang'; there are: vllm, transformers, scripted"):
        open_engine("sglang", checkpoint, EngineOptions())


def test_the_same_name_and_options_get_the_same_engine_with_the_new_checkpoint(checkpoint, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"vocab_size": 3, "max_position_embeddings": 100}))
    first = open_engine("scripted", checkpoint, EngineOptions())
    assert open_engine("scripted", other, EngineOptions()) is first
    with pytest.raises(EngineError, match="vocabulary of 3"):
        first.generate(Request([[4]], [0]), Sampling(group_size=1, max_tokens=2, stop_ids=(1,)))


def test_other_options_get_another_engine_and_close_the_first(checkpoint):
    first = open_engine("scripted", checkpoint, EngineOptions())
    second = open_engine("scripted", checkpoint, EngineOptions(seed=1))
    assert first.closed
    assert not second.closed


def test_an_engine_that_failed_is_not_handed_out_again(checkpoint, tmp_path):
    first = open_engine("scripted", checkpoint, EngineOptions())
    with pytest.raises(EngineError):
        open_engine("scripted", tmp_path / "nowhere", EngineOptions())
    assert first.closed
    second = open_engine("scripted", checkpoint, EngineOptions())
    assert second is not first
    assert not second.closed


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_size": 0},
        {"group_size": -1},
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"max_tokens": 0},
        {"beams": 0},
        {"beams": 2, "group_size": 3},
        {"beams": 4, "temperature": 0.9},
        {"beams": 4, "top_p": 0.9},
        {"beams": 4, "top_k": 3},
        {"beams": 4, "greedy": True},
        {"beans": 4},
    ],
)
def test_a_plan_that_means_nothing_is_refused(wrong):
    with pytest.raises(ValidationError):
        Sampling(**{"group_size": 1, "max_tokens": 4, "stop_ids": (1,), **wrong})
