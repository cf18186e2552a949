"""oneDNN forms products where it is exact and wider, and only there: torch's switch is otherwise as it was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline import products
from pipeline.engines.reading import FEW, Reader
from pipeline.models.forward import response_logprobs
from pipeline.models.fresh import ModelSpec, create
from pipeline.products import exact_and_wide, narrow_products, wide_products
from pipeline.training.loop import Losses, _backward


def switch():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def able(monkeypatch):
    """What torch says of a processor whose products keep all bits; asked anew before and after the test."""
    told = {"avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    monkeypatch.setattr(products, "_keeps_all_bits", lambda size: True)
    exact_and_wide.cache_clear()
    yield told
    exact_and_wide.cache_clear()


@pytest.fixture
def seen(monkeypatch):
    """The switch as it stood at each product of a layer."""
    monkeypatch.setattr(products, "exact_and_wide", lambda: True)
    values = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: values.append(switch()) if isinstance(module, torch.nn.Linear) else None
    )
    yield values
    hook.remove()


@pytest.fixture
def policy():
    """A small one."""
    made, _ = create(ModelSpec(layers=1, width=64, heads=2, max_position=64), ["0123456789"], 1)
    return made.train()


@pytest.mark.parametrize("size", [(130, 128, 384), (2048, 384, 128), (3, 16, 5)])
def test_products_keep_the_digits_of_float32(size):
    rows, inner, columns = size
    draw = torch.Generator().manual_seed(rows)
    one = torch.randn(rows, inner, generator=draw, requires_grad=True)
    other = torch.randn(inner, columns, generator=draw, requires_grad=True)
    with wide_products():
        found = one @ other
        gradients = torch.autograd.grad(found.square().sum(), (one, other))
    exact = one.detach().double() @ other.detach().double()
    assert (found - exact).abs().max() < 4e-7 * inner**0.5 * exact.abs().max()
    of_one = 2 * exact @ other.detach().double().t()
    assert torch.allclose(gradients[0].double(), of_one, rtol=1e-4, atol=1e-5 * float(of_one.abs().max()))


def test_the_switch_is_as_it_was_afterwards(able):
    before = switch()
    with pytest.raises(ZeroDivisionError), wide_products():
        assert switch() == "bf16"
        with narrow_products():
            assert switch() == "none"
        assert switch() == "bf16"
        1 / 0  # noqa: B018
    assert switch() == before


@pytest.mark.parametrize("told", [{"amx_tile": True}, {"avx512_f": False}])
def test_processors_with_matrix_units_or_narrow_registers_stay_as_they_are(able, told):
    able |= told
    before = switch()
    with wide_products():
        assert switch() == before


def test_products_that_round_are_not_taken(able, monkeypatch):
    monkeypatch.setattr(products, "_keeps_all_bits", lambda size: size < 128)
    before = switch()
    with wide_products():
        assert switch() == before


def test_training_reads_and_goes_back_by_wide_products(policy, seen):
    before, backward = switch(), []
    policy.get_input_embeddings().weight.register_hook(lambda _: backward.append(switch()))

    def losses(model, rows, step):
        return Losses(response_logprobs(model, [[1, 2]] * len(rows), [[3, 4]] * len(rows)).logprobs.sum(), {})

    objective = SimpleNamespace(
        lengths=np.full(4, 4), groups=None, step=lambda rows: None, passes=lambda rows: [rows], losses=losses
    )  # fmt: skip
    _backward([policy], objective, np.arange(4), 1000)
    assert set(seen) == set(backward) == {"bf16"}
    assert switch() == before


@pytest.mark.parametrize("rows", [1, FEW])
def test_a_sampler_with_few_rows_does_not(policy, seen, rows):
    before = switch()
    reader = Reader(policy.eval(), [[1]] * rows, rows, torch.device("cpu"))
    reader.read(np.arange(rows), torch.zeros(rows, dtype=torch.long))
    assert set(seen) == {"bf16" if rows == FEW else before}
