"""The optimizer: schedules, decay, and a state that goes on where it stopped."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import ArtifactError
from pipeline.training.optimizer import TRAINER, adamw, constant, cosine, load_state, save_state


def model(width=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 1))


def step(network, optimizer, count):
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        network(torch.randn(4, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_constant_warms_up_linearly_and_stays():
    assert [constant(3)(i) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert constant(0)(0) == constant(0)(10**9) == 1.0


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_warms_up_falls_and_ends_at_its_share(warmup):
    schedule = cosine(warmup, 20, 0.1)
    shares = [schedule(i) for i in range(25)]
    assert shares[:warmup] == [(i + 1) / (warmup + 1) for i in range(warmup)]
    assert shares[warmup] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(shares[warmup:20], shares[warmup + 1 : 21], strict=True))
    assert schedule(warmup + (20 - warmup) // 2) == pytest.approx((1 + 0.1) / 2)
    assert shares[20:] == [pytest.approx(0.1)] * 5


def test_cosine_of_nothing_but_warm_up_is_defined():
    assert all(0 < cosine(5, 5, 0.1)(i) <= 1 for i in range(10))
    assert math.isclose(cosine(0, 0, 0.5)(1), 0.5)


def test_only_matrices_decay():
    network = model()
    optimizer = adamw(network, 0.1, 0.5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.5, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.5, "2.bias": 0.0,
    }  # fmt: skip


def test_frozen_parameters_are_left_out_and_a_model_of_matrices_alone_works():
    network = model()
    network[0].weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in adamw(network, 0.1, 0.0).param_groups) == 5
    alone = nn.Linear(3, 1, bias=False)
    step(alone, adamw(alone, 0.1, 0.1), 1)


def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path):
    straight = model()
    optimizer = adamw(straight, 0.01, 0.1)
    step(straight, optimizer, 3)
    save_state(optimizer, 3, tmp_path)
    resumed = model()
    resumed.load_state_dict(straight.state_dict())
    fresh = adamw(resumed, 0.01, 0.1)
    assert load_state(fresh, tmp_path) == 3
    step(straight, optimizer, 4)
    step(resumed, fresh, 4)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    forgetful = adamw(model(), 0.01, 0.1)
    assert load_state(forgetful, tmp_path / "elsewhere") == 0


def test_learning_rate_and_decay_come_from_the_settings_not_from_the_state(tmp_path):
    optimizer = adamw(model(), 0.01, 0.1)
    step(model(), optimizer, 1)
    save_state(optimizer, 1, tmp_path)
    other = adamw(model(), 0.5, 0.3)
    load_state(other, tmp_path)
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in other.param_groups] == [0.3, 0.0]


TENSORS, STATE = "optimizer.safetensors", "state.json"


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with the state after one step."""
    network = model()
    optimizer = adamw(network, 0.1, 0.0)
    step(network, optimizer, 1)
    save_state(optimizer, 1, tmp_path)
    return tmp_path


def refused(checkpoint, network=None):
    """The error of loading its state, with nothing changed by it."""
    optimizer = adamw(model() if network is None else network, 0.1, 0.0)
    with pytest.raises(ArtifactError, match="unusable optimizer state") as caught:
        load_state(optimizer, checkpoint)
    assert not optimizer.state
    assert caught.value.do == "delete the artifact and re-run"
    return caught.value


def test_a_state_is_tensors_and_json_and_the_same_bytes_twice(saved, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    optimizer = adamw(model(), 0.1, 0.0)
    load_state(optimizer, saved)
    save_state(optimizer, 1, again)
    assert sorted(path.name for path in (saved / TRAINER).iterdir()) == [TENSORS, STATE]
    assert all(
        (saved / TRAINER / name).read_bytes() == (again / TRAINER / name).read_bytes() for name in (TENSORS, STATE)
    )
    names = {f"{number}.{name}" for number in range(6) for name in ("step", "exp_avg", "exp_avg_sq")}
    assert load_file(saved / TRAINER / TENSORS).keys() == names
    assert json.loads((saved / TRAINER / STATE).read_text()) == {"step": 1, "groups": [2, 4]}


def test_a_restored_state_does_not_lean_on_its_file(saved):
    optimizer = adamw(model(), 0.1, 0.0)
    load_state(optimizer, saved)
    path = saved / TRAINER / TENSORS
    path.write_bytes(bytes(path.stat().st_size))
    assert all(of["exp_avg"].any() for of in optimizer.state.values())


def test_before_the_first_step_there_is_nothing_to_remember(tmp_path):
    save_state(adamw(model(), 0.1, 0.0), 0, tmp_path)
    optimizer = adamw(model(), 0.1, 0.0)
    assert load_state(optimizer, tmp_path) == 0
    assert not optimizer.state


@pytest.mark.parametrize("name", [TENSORS, STATE])
@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip", b"[]", b"{}", None])
def test_a_broken_state_is_named(saved, name, content):
    path = saved / TRAINER / name
    path.unlink() if content is None else path.write_bytes(content)
    assert refused(saved).where == str(path)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (nn.Linear(3, 1), "made for groups of [2, 4] parameters, this model has [1, 1]"),
        (model(width=6), "'exp_avg': [5, 3]"),
    ],
    ids=["fewer parameters", "other shapes"],
)
def test_the_state_of_another_model_is_refused(saved, other, why):
    assert why in refused(saved, other).what


def test_half_a_state_is_refused(saved):
    path = saved / TRAINER / TENSORS
    path.write_bytes(path.read_bytes()[:-100])
    assert refused(saved).where == str(path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"1.exp_avg": None}, r"parameter 1 has \{'exp_avg_sq': \[1, 5\], 'step': \[\]\}, not"),
        ({"2.exp_avg": torch.zeros(())}, r"parameter 2 has .*'exp_avg': \[\]"),
        ({"0.step": torch.zeros(5, 3)}, r"parameter 0 has .*'step': \[5, 3\]"),
        ({"6.step": torch.zeros(())}, "6"),
        ({"norm.exp_avg": torch.zeros(5)}, "norm"),
    ],
    ids=["a tensor gone", "a scalar for a moment", "a moment for a step", "a parameter more", "a name"],
)  # fmt: skip
def test_a_state_of_other_tensors_is_refused(saved, changes, why):
    path = saved / TRAINER / TENSORS
    tensors = {**load_file(path), **changes}
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, path)
    assert re.search(why, refused(saved).what)


def test_a_state_of_before_safetensors_is_not_quietly_forgotten(saved):
    shutil.rmtree(saved / TRAINER)
    (saved / TRAINER).mkdir()
    (saved / TRAINER / "state.pt").write_bytes(b"anything")
    assert "state.json" in refused(saved).what
