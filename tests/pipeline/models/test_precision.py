"""Half precision changes what layers compute, not what is trained; recomputing changes neither."""

import pytest
import torch

from pipeline.models.forward import response_logprobs, response_scores, response_values
from pipeline.models.fresh import ModelSpec, create
from pipeline.models.precision import computing
from pipeline.training.optimizer import adamw

PROMPTS, RESPONSES = [[1, 5, 9], [4, 3, 7, 8]], [[6, 2, 11, 4, 9], [7, 3]]


@pytest.fixture
def fresh():
    """A policy, the same each time."""

    def made(dtype="float32", recompute=False):
        shape = ModelSpec(layers=3, width=64, heads=4, kv_heads=2, max_position=64)
        policy, _ = create(shape, ["0123456789+=, abc"], 7)
        return computing(policy, dtype, recompute).train()

    return made


def stepped(model):
    """The numbers of a forward pass, the gradients, and the weights after a step."""
    optimizer = adamw(model, 1e-3, 0.0)
    found = response_logprobs(model, PROMPTS, RESPONSES).logprobs
    found.sum().backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    optimizer.step()
    return found.detach(), gradients, {name: one.detach().clone() for name, one in model.named_parameters()}


def bytes_kept(model):
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    long = [[n % 10 for n in range(48)]] * 4
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = response_logprobs(model, [[1]] * 4, long).logprobs.sum()
    total = sum(kept.values())
    found.backward()
    return total


def test_half_precision_is_near_and_another_and_trains_float32_weights(fresh):
    plain, of_plain, _ = stepped(fresh())
    half, of_half, weights = stepped(fresh("bfloat16"))
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < 0.05
    for name, weight in weights.items():
        assert weight.dtype == of_half[name].dtype == torch.float32, name
        assert torch.nn.functional.cosine_similarity(of_half[name].flatten(), of_plain[name].flatten(), 0) > 0.99, name


def test_a_step_too_small_for_half_precision_is_kept_by_the_master_weights(fresh):
    model = fresh("bfloat16")
    before = model.lm_head.weight.detach().clone()
    optimizer = adamw(model, 1e-6, 0.0)
    response_logprobs(model, PROMPTS, RESPONSES).logprobs.sum().backward()
    optimizer.step()
    after = model.lm_head.weight.detach()
    assert (after != before).float().mean() > 0.9
    assert (after.bfloat16() != before.bfloat16()).float().mean() < 0.1


def test_recomputing_changes_no_bit(fresh):
    for ours, theirs in zip(stepped(fresh(recompute=True)), stepped(fresh()), strict=True):
        if isinstance(ours, dict):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        else:
            assert torch.equal(ours, theirs)


def test_recomputing_keeps_less(fresh):
    whole, less = bytes_kept(fresh()), bytes_kept(fresh(recompute=True))
    assert less < whole / 3
    assert bytes_kept(fresh("bfloat16")) < whole


def test_heads_of_half_precision_models_answer_in_float32(fresh, tmp_path):
    from pipeline.models import checkpoint

    policy = fresh()
    _, tokenizer = create(ModelSpec(layers=1, width=64, heads=2, max_position=64), ["0123456789+=, abc"], 1)
    checkpoint.save(policy, tokenizer, tmp_path)
    critic, reader = checkpoint.fresh_critic(tmp_path, 3), checkpoint.fresh_reward_model(tmp_path, 3)
    for model, read in (
        (critic, lambda model: response_values(model, PROMPTS, RESPONSES).values),
        (reader, lambda model: response_scores(model, PROMPTS * 2, [*RESPONSES, [2], [8, 8, 8]])),
    ):
        with torch.no_grad():
            plain, half = read(model), read(computing(model, "bfloat16"))
        assert half.dtype == torch.float32
        assert 0 < (half - plain).abs().max() < 0.05
