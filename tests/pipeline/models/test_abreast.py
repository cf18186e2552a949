"""Work on several threads: all of it, in order, each on its own processors; models that share weights alone."""

import threading

import pytest
import torch
from torch import nn

from pipeline.models import abreast as module
from pipeline.models.abreast import MOST_WEIGHTS, abreast, gather_gradients, lanes, on_the_same_weights

pytestmark = pytest.mark.usefixtures("two_processors")


def test_all_is_done_in_order_on_threads_of_one_processor_each():
    both = threading.Barrier(2, timeout=30)

    def work(piece):
        both.wait()  # nobody gets past it alone
        return piece, threading.get_ident(), torch.get_num_threads()

    found = list(abreast(work, range(6), 2))
    assert [piece for piece, _, _ in found] == list(range(6))
    assert len({thread for _, thread, _ in found}) == 2
    assert {processors for _, _, processors in found} == {1}


def test_on_one_lane_the_caller_works_itself():
    found = list(abreast(lambda piece: (piece, threading.get_ident(), torch.get_num_threads()), "ab", 1))
    assert found == [("a", threading.get_ident(), 2), ("b", threading.get_ident(), 2)]


def test_processors_are_as_before_afterwards_here_and_in_threads_to_come():
    def fail(piece):
        raise ValueError(piece)

    with pytest.raises(ValueError, match="first"):
        list(abreast(fail, ["first", "second", "third"], 2))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), seen) == (2, [2])


def test_a_lane_per_processor_but_one_where_the_model_is_large(monkeypatch):
    small, large = nn.Linear(3, 3), nn.Linear(MOST_WEIGHTS, 1, device="meta")
    assert (lanes(small), lanes(large)) == (2, 1)
    monkeypatch.setattr(module, "count", lambda: 2)
    assert lanes(small) == 1


def test_a_model_on_the_same_weights_steps_with_them_and_has_gradients_of_its_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight  # tied
    model[0].bias.requires_grad = False
    other = on_the_same_weights(model)
    x, y = torch.randn(2, 4, 3)
    model(x).sum().backward()
    other(y).square().sum().backward()
    assert other[1].weight is other[0].weight is not model[0].weight
    assert not other[0].bias.requires_grad
    ours, theirs = model[0].weight.grad.clone(), other[0].weight.grad.clone()
    gather_gradients([model, other])
    assert torch.equal(model[0].weight.grad, ours + theirs)
    assert other[0].weight.grad is None
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model(y), other(y))


def test_a_gradient_that_the_first_has_not_is_kept():
    model = nn.Linear(3, 1)
    other = on_the_same_weights(model)
    other(torch.ones(1, 3)).sum().backward()
    gather_gradients([model, other])
    assert model.weight.grad.tolist() == [[1.0, 1.0, 1.0]]
