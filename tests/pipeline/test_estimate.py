"""What an iteration will take, against models and files that are there."""

import json

import pytest
from transformers import AutoModelForCausalLM, Qwen3Config

from pipeline.estimate import ACTIVATIONS, DEVICES, Shape, Training, Work, checkpoint, iteration

CONFIG = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 192,
}  # fmt: skip
SEVEN = Shape(28, 3584, 28, 4, 128, 18944, 152064, False)
"""Qwen2.5-7B."""
HALF = Training(4096, half=True)


def work(**changes):
    return Work(**{"responses": 8192, "prompt_tokens": 2048, "response_tokens": 8000.0, "needs": 1, "epochs": 1,
                   "critic": False, **changes})  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied):
    given = {**CONFIG, "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**given))
    norms_of_heads = 2 * given["head_dim"] * given["num_hidden_layers"]
    assert Shape.of(json.loads(json.dumps(given))).parameters == model.num_parameters() - norms_of_heads


def test_a_model_of_seven_billion():
    assert SEVEN.parameters == pytest.approx(7.6e9, rel=0.01)
    assert checkpoint(SEVEN) == 12 * SEVEN.parameters
    assert SEVEN.cache == 2 * 2 * 28 * 4 * 128


def test_more_devices_take_less_time_and_less_memory_each():
    eight, many = (iteration(SEVEN, work(), DEVICES["h100"], count, HALF, 2) for count in (8, 64))
    assert eight.keys() == many.keys() == {"rollout", "label", "score", "advantage", "update"}
    for name in ("rollout", "score", "update"):
        assert many[name].seconds < eight[name].seconds
        assert many[name].written == eight[name].written
    assert many["update"].memory < eight["update"].memory


def test_what_the_recipe_asks_for_is_what_is_reckoned():
    plain = iteration(SEVEN, work(needs=0), DEVICES["h100"], 8, HALF, 2)
    assert "score" not in plain and "value" not in plain
    both = iteration(SEVEN, work(needs=3, epochs=2, critic=True), DEVICES["h100"], 8, HALF, 2)
    assert both["value"] == both["update"]
    assert both["update"].seconds > 1.5 * plain["update"].seconds
    assert both["score"].written > 2 * iteration(SEVEN, work(), DEVICES["h100"], 8, HALF, 2)["score"].written


def test_an_engine_decodes_as_many_responses_as_its_memory_holds():
    short, long = (iteration(SEVEN, work(response_tokens=n), DEVICES["h100"], 8, HALF, 2) for n in (500.0, 16000.0))
    assert long["rollout"].memory <= 0.9 * DEVICES["h100"].memory
    assert long["rollout"].seconds / short["rollout"].seconds > 16000 / 500, "more waves, each of more steps"


def test_recomputing_takes_a_third_more_work_and_leaves_the_inputs_of_layers():
    kept, again = (
        iteration(SEVEN, work(), DEVICES["h100"], 8, Training(4096, True, recompute), 2) for recompute in (False, True)
    )
    saved = checkpoint(SEVEN) / DEVICES["h100"].storage
    assert (again["update"].seconds - saved) / (kept["update"].seconds - saved) == pytest.approx(4 / 3)
    assert again["score"].seconds == kept["score"].seconds
    less = kept["update"].memory - again["update"].memory
    assert less == pytest.approx(4096 * 3584 * (ACTIVATIONS * 27 - 4 * 28))


def test_float32_takes_the_device_s_own_speed_and_twice_the_activations():
    half, single = (Training(4096, half) for half in (True, False))
    assert single.activations(SEVEN) == 2 * half.activations(SEVEN)
    slow, fast = (iteration(SEVEN, work(), DEVICES["h100"], 8, how, 2)["score"].seconds for how in (single, half))
    assert slow / fast == pytest.approx(989 / 67)
