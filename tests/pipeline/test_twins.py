"""Twins are what `deepcopy` makes, with other tensors: the same modules, hooks and ties, and nothing that is shared."""

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from pipeline.twins import twin

CONFIG = Qwen3Config(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=32, tie_word_embeddings=True,
)  # fmt: skip


def built():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    model.model.layers[1].register_forward_hook(lambda module, given, made: None)
    model.own = {"layer": model.model.layers[0], "numbers": [1, 2], "config": model.config}
    return model


def doubled(model):
    return {id(of): nn.Parameter(2 * of.detach(), of.requires_grad) for of in model.parameters()}


def test_a_twin_is_what_deepcopy_makes():
    model = built()
    tensors = doubled(model)
    ours, theirs = twin(model, tensors), copy.deepcopy(model, dict(tensors))
    assert str(ours) == str(theirs)
    assert [type(one) for one in ours.modules()] == [type(one) for one in theirs.modules()]
    for one, other in zip(ours.modules(), theirs.modules(), strict=True):
        assert vars(one).keys() == vars(other).keys()
        assert {name: type(of) for name, of in vars(one).items()} == {
            name: type(of) for name, of in vars(other).items()
        }
        assert one._forward_hooks.keys() == other._forward_hooks.keys()
    assert all(
        torch.equal(*pair) for pair in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert ours.lm_head.weight is ours.model.embed_tokens.weight is tensors[id(model.lm_head.weight)]
    tokens = torch.arange(5)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_a_twin_shares_only_the_tensors_that_it_is_given():
    model = built()
    other = twin(model, {id(of): of for of in model.parameters()})
    assert all(one is of for one, of in zip(other.parameters(), model.parameters(), strict=True))
    assert not {id(one) for one in model.modules()} & {id(one) for one in other.modules()}
    assert not {id(one) for one in model.buffers()} & {id(one) for one in other.buffers()}
    assert other.own["layer"] is other.model.layers[0]
    assert other.own["config"] is other.config is other.model.config is other.model.layers[0].self_attn.config
    assert other.config is not model.config
    other.own["numbers"].append(3)
    other.model.layers[0].register_forward_hook(lambda module, given, made: None)
    other.eval()
    assert (model.own["numbers"], len(model.model.layers[0]._forward_hooks), model.training) == ([1, 2], 0, True)
