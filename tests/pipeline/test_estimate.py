"""What an iteration will take, against models and files that are there."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

from pipeline.errors import ExperimentError
from pipeline.estimate import (
    DEVICES,
    MIXTURES,
    READ,
    STARTS,
    TORCHRUN,
    Place,
    Sampler,
    Shape,
    Training,
    Work,
    checkpoint,
    hosted,
    iteration,
    sampled,
    shards,
    trained,
)
from pipeline.models import checkpoint as checkpoints
from pipeline.models.forward import response_logprobs
from pipeline.models.precision import computing

CONFIG = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 192,
}  # fmt: skip
SEVEN = Shape(28, 3584, 28, 4, 128, 18944, 152064, False)
"""Qwen2.5-7B."""
HALF = Training(4096, half=True)
H100 = DEVICES["h100"]
ENGINE = Sampler(2)


def work(**changes):
    return Work(**{"responses": 8192, "group": 16, "prompt_tokens": 2048, "response_tokens": 8000.0, "longest": 8000.0,
                   "needs": 1, "epochs": 1, "minibatches": 16, **changes})  # fmt: skip


def reckoned(count, training=HALF, launcher="torchrun", sampler=ENGINE, **changes):
    return iteration(SEVEN, work(**changes), Place(H100, count, launcher), training, sampler)


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


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts_are_refused(name):
    with pytest.raises(ExperimentError, match=f"{name} = 128: mixtures of experts are not reckoned"):
        Shape.of({**CONFIG, name: 128})
    assert Shape.of({**CONFIG, name: None}) == Shape.of(CONFIG)
    assert MIXTURES == checkpoints.MIXTURES


def test_more_devices_take_less_time_and_less_memory_each():
    eight, many = (reckoned(count) for count in (8, 64))
    assert eight.keys() == many.keys() == {"rollout", "label", "score", "advantage", "update"}
    for name in ("score", "update"):
        assert many[name].seconds < eight[name].seconds
        assert many[name].written == eight[name].written
    assert many["update"].memory < eight["update"].memory


def test_a_launcher_gives_a_stage_one_device_or_all():
    inline, process, torchrun, ray = (reckoned(16, launcher=name) for name in ("inline", "process", "torchrun", "ray"))
    engines = Place(H100, 16, "ray").engines(replace(ENGINE, devices=4))
    assert engines == 4 and Place(H100, 16, "torchrun").engines(ENGINE) == 1
    assert inline["rollout"].seconds == process["rollout"].seconds == torchrun["rollout"].seconds
    assert ray["rollout"].seconds < torchrun["rollout"].seconds / 8
    assert inline["update"].memory == ray["update"].memory > 16 * SEVEN.parameters
    saved = checkpoint(SEVEN) / H100.storage
    assert inline["update"].seconds - saved == pytest.approx(16 * (torchrun["update"].seconds - saved))
    assert inline["score"].seconds == pytest.approx(16 * ray["score"].seconds)
    starts = {made["label"].start for made in (inline, process, torchrun, ray)}
    assert starts == {0.0, STARTS["label"]} and inline["label"].start == 0.0


def test_stages_may_have_launchers_of_their_own():
    trained = dict.fromkeys(("update", "value"), "torchrun")
    both = iteration(SEVEN, work(), Place(H100, 16, "ray", trained), HALF, ENGINE)
    ray, torchrun = reckoned(16, launcher="ray"), reckoned(16, launcher="torchrun")
    assert [both[name] for name in ("rollout", "score")] == [ray[name] for name in ("rollout", "score")]
    assert both["update"] == torchrun["update"]


def test_a_start_is_the_process_and_the_models_that_it_reads():
    weights = 4 * SEVEN.parameters / H100.storage
    assert reckoned(8, launcher="inline")["rollout"].start == pytest.approx(weights)
    process, torchrun = (reckoned(8, launcher=launcher, needs=2) for launcher in ("process", "torchrun"))
    assert process["score"].start == pytest.approx(STARTS["score"] + 2 * weights)
    assert process["update"].start == pytest.approx(STARTS["update"] + 3 * weights)
    assert torchrun["update"].start == process["update"].start + TORCHRUN
    assert torchrun["rollout"].start == process["rollout"].start
    assert sum(STARTS[name] for name in process) == pytest.approx(23.0, rel=0.05), "tests/benchmarks/README.md"


def test_cores_are_one_device():
    two = Place.of(DEVICES["core"], 2, "inline")
    assert (two.count, two.device.memory, two.device.flops) == (1, 16e9, 1e11)
    assert Place.of(H100, 2, "inline").count == 2


def test_shards_are_cut_as_the_stages_cut_them():
    from stages import score

    assert score.SHARD == READ
    assert shards(work(), Sampler(2, at_once=100), "ray") == (74, 112), "seven whole groups of 16"
    assert shards(work(), ENGINE, "inline") == (1, 8192), "each part follows the one before without a pause"
    assert shards(work(responses=32), ENGINE, "ray") == (1, 32)


def test_what_the_recipe_asks_for_is_what_is_reckoned():
    plain = reckoned(8, needs=0)
    assert "score" not in plain and "value" not in plain
    both = reckoned(8, needs=3, epochs=2, critic=SEVEN)
    assert both["value"] == both["update"]
    assert both["update"].seconds > 1.5 * plain["update"].seconds
    assert both["score"].written > 2 * reckoned(8)["score"].written
    headless = reckoned(8, critic=replace(SEVEN, tied=True))
    assert headless["value"].memory < headless["update"].memory


def test_an_engine_decodes_as_many_responses_as_its_memory_holds():
    short, long = (reckoned(8, response_tokens=n, longest=n, launcher="ray") for n in (500.0, 16000.0))
    assert long["rollout"].memory <= 0.9 * H100.memory
    assert long["rollout"].seconds / short["rollout"].seconds > 16000 / 500, "more waves, each of more steps"


def test_the_longest_response_is_the_floor_of_sampling():
    asked = work(longest=20480.0)
    seconds, _ = sampled(SEVEN, asked, Place(H100, 512, "ray"), Sampler(2, at_once=16))
    mean, _ = sampled(SEVEN, work(), Place(H100, 512, "ray"), Sampler(2, at_once=16))
    assert seconds >= 20480 * H100.step > 2 * mean
    few, _ = sampled(SEVEN, asked, Place(H100, 16, "ray"), Sampler(2, at_once=16))
    assert few == pytest.approx(32 * seconds), "every call of an engine ends with its longest response"


def test_tensor_parallel_shares_weights_and_bandwidth():
    alone, four = (
        sampled(SEVEN, work(), Place(H100, 4, "inline"), replace(ENGINE, devices=devices)) for devices in (1, 4)
    )
    assert four[0] < alone[0] / 3 and four[1] <= 0.9 * H100.memory


def test_recomputing_takes_a_third_more_work_and_leaves_the_inputs_of_layers():
    asked = work()
    kept, again = (reckoned(8, Training(4096, True, recompute)) for recompute in (False, True))
    saved = checkpoint(SEVEN) / H100.storage
    assert (again["update"].seconds - saved) / (kept["update"].seconds - saved) == pytest.approx(4 / 3)
    assert again["score"].seconds == kept["score"].seconds
    tokens = HALF.at_once(asked)
    assert tokens == asked.row == 10048, "a row longer than the micro-batch goes alone"
    layer = tokens * (40 * 3584 + 4 * 2 * 18944) + 2 * SEVEN.layer
    assert kept["update"].memory - again["update"].memory == pytest.approx(27 * layer - tokens * 4 * 3584 * 28)


def test_a_micro_batch_is_no_larger_than_an_optimizer_step():
    assert Training(10**9).at_once(work()) == 512 * 10048
    assert Training(20000).at_once(work()) == 20000


def test_float32_takes_the_device_s_own_speed():
    slow, fast = (reckoned(8, Training(4096, half))["score"].seconds for half in (False, True))
    assert slow / fast == pytest.approx(989 / 67)


def test_offloaded_moments_lie_in_the_host_s_memory():
    assert trained(SEVEN) - trained(SEVEN, offload=True) == 8 * SEVEN.parameters
    assert hosted(SEVEN) == 16 * SEVEN.parameters
    assert hosted(SEVEN, 16) == 16 * SEVEN.adapters(16)


def small(layers=4):
    """A model in which layers are nearly all weights, and its shape."""
    config = Qwen3Config(
        vocab_size=64, hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model, Shape.of(config.to_dict())


def forward(model):
    """Eight rows of 64 tokens, 16 of them the prompt's."""
    return response_logprobs(model, [[1] * 16] * 8, [[2] * 48] * 8).logprobs.sum()


def test_operations_of_a_pass_are_near_those_counted():
    model, shape = small()
    with torch.no_grad():
        forward(model)  # a process tries once how exact its products are, and those are no part of a pass
        with FlopCounterMode(display=False) as reading:
            forward(model)
    with FlopCounterMode(display=False) as training:
        forward(model).backward()
    told = 2 * shape.parameters * 8 * 64
    assert reading.get_total_flops() == pytest.approx(told, rel=0.2)
    assert training.get_total_flops() == pytest.approx(3 * told, rel=0.2)


def kept_by(model):
    """Bytes that a forward pass keeps for the backward pass, besides the model's own."""
    own, kept = {weights.untyped_storage().data_ptr() for weights in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_further_layers_are_near_those_counted(half, recompute):
    counted, told = [], []
    for layers in (2, 6):
        model, shape = small(layers)
        counted.append(kept_by(computing(model, "bfloat16" if half else "float32", recompute).train()))
        told.append(Training(4096, half, recompute).activations(shape, 8 * 64))
    assert told[1] - told[0] == pytest.approx(counted[1] - counted[0], rel=0.25)
