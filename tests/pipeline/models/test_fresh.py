"""Fresh models: deterministic, any text and back, prompts that are prefixes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import ExperimentError
from pipeline.models.fresh import ModelSpec, create

SMALL = {"layers": 1, "width": 32, "heads": 1, "kv_heads": 1, "max_position": 64}
KINDS = ["characters", "bpe"]


@pytest.fixture(scope="module")
def tokenizers(texts):
    return {kind: create(ModelSpec(tokenizer=kind, vocab_size=320, **SMALL), texts, 0)[1] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_makes_the_same_model_and_tokenizer(texts, kind):
    spec = ModelSpec(tokenizer=kind, vocab_size=320, **SMALL)
    (one, first), (other, second) = create(spec, texts, 5), create(spec, texts, 5)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    third = create(spec, texts, 6)[0]
    assert not torch.equal(one.lm_head.weight, third.lm_head.weight)


def test_making_a_model_leaves_the_random_state_alone(texts):
    before = torch.random.get_rng_state()
    create(ModelSpec(**SMALL), texts, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_as_it_went_in(tokenizers, texts, kind):
    for text in [*texts, "  two  spaces \n\n"]:
        ids = tokenizers[kind](text)["input_ids"]
        assert tokenizers[kind].decode(ids) == text


def test_a_character_is_a_token(tokenizers, texts):
    ids = tokenizers["characters"](texts[2])["input_ids"]
    assert len(ids) == len(texts[2])
    assert tokenizers["characters"].unk_token_id not in ids


def test_an_unknown_character_is_the_unknown_token(tokenizers):
    tokenizer = tokenizers["characters"]
    assert tokenizer("a§b")["input_ids"][1] == tokenizer.unk_token_id


def test_bpe_writes_any_text(tokenizers):
    text = "§ ¶ 🙂 \x00 ю"
    assert tokenizers["bpe"].decode(tokenizers["bpe"](text)["input_ids"]) == text


def test_bpe_learns_merges_up_to_its_size(tokenizers):
    assert 256 < len(tokenizers["bpe"]) <= 320


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_the_end(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert {tokenizer.pad_token_id, tokenizer.eos_token_id} == {0, 1}


CONTENT = st.text(alphabet="aeiou 12+?\n:.A", max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=CONTENT.filter(bool), response=CONTENT)
def test_the_prompt_is_a_strict_prefix_and_the_whole_ends_with_the_end_token(tokenizers, kind, prompt, response):
    tokenizer = tokenizers[kind]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(before)] == before
    assert len(whole) > len(before)
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in whole[:-1]
    assert tokenizer.decode(whole[len(before) :], skip_special_tokens=True) == (
        response if kind == "bpe" else "".join(c for c in response if c in tokenizer.get_vocab())
    )


def test_the_character_template_adds_nothing(tokenizers):
    messages = [{"role": "user", "content": " is 4?\n"}, {"role": "assistant", "content": "It"}]
    text = tokenizers["characters"].apply_chat_template(messages, tokenize=False)
    assert text == " is 4?\nIt<eos>"


def test_the_bpe_template_names_the_speakers(tokenizers):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    text = tokenizers["bpe"].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "System: SUser: Q\nAssistant: "


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_only_when_asked(texts, tied):
    model, tokenizer = create(ModelSpec(tied=tied, **SMALL), texts, 0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.tie_word_embeddings == tied
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_the_default_is_small():
    model, _ = create(ModelSpec(), ["0123456789"], 0)
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.5e6


def test_no_text_is_refused():
    with pytest.raises(ExperimentError, match="no text"):
        create(ModelSpec(), ["", ""], 0)


@pytest.mark.parametrize("wrong", [{"width": 100}, {"heads": 3}, {"kv_heads": 3}, {"layers": 0}, {"depth": 3}])
def test_a_shape_that_does_not_fit_is_refused(wrong):
    with pytest.raises(ValidationError):
        ModelSpec(**wrong)
