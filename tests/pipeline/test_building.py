"""Models of which one like it was built before: the same as transformers', with weights of their own."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from pipeline import building
from pipeline.building import built, refilled
from pipeline.models.checkpoint import fresh_critic, fresh_reward_model, load_policy, save
from pipeline.models.forward import PACKED, response_logprobs
from pipeline.models.fresh import ModelSpec, create

TEXT = "What is 12 + 30?\n"
SIZES = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "max_position": 64, "init_std": 0.2}
LOADERS = {
    "tied": AutoModelForCausalLM, "untied": AutoModelForCausalLM,
    "reward_model": AutoModelForSequenceClassification, "critic": AutoModelForTokenClassification,
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Kind -> two checkpoints that differ in their weights alone; nobody may write there."""
    room = tmp_path_factory.mktemp("pairs")
    found = {}
    for kind in LOADERS:
        found[kind] = [room / f"{kind}-{seed}" for seed in range(2)]
        for seed, place in enumerate(found[kind]):
            model, tokenizer = create(ModelSpec(**SIZES, tied=kind == "tied"), [TEXT], seed)
            if kind in ("reward_model", "critic"):
                save(model, tokenizer, room / "policy")
                model = (fresh_critic if kind == "critic" else fresh_reward_model)(room / "policy", seed)
            save(model, tokenizer, place)
    return found


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """The checkpoints that transformers opens; it has opened none before."""
    monkeypatch.setattr(building, "_templates", {})
    paths = []
    for loader in {*LOADERS.values()}:

        def noted(path, *, inner=loader.from_pretrained, **given):
            paths.append(path)
            return inner(path, **given)

        monkeypatch.setattr(loader, "from_pretrained", noted)
    return paths


def theirs(loader, path, dtype=torch.float32):
    return loader.from_pretrained(path, dtype=dtype)


def same(ours, expected):
    own, wanted = ours.state_dict(), expected.state_dict()
    assert type(ours) is type(expected)
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)
    assert [(name, of.requires_grad, of.dtype) for name, of in ours.named_parameters()] == [
        (name, of.requires_grad, of.dtype) for name, of in expected.named_parameters()
    ]
    assert not ours.training
    assert all(of.device.type == "cpu" for of in (*ours.parameters(), *ours.buffers()))
    assert ours.config.to_dict() == expected.config.to_dict()
    assert ours.can_generate() == expected.can_generate()
    if ours.can_generate():
        assert ours.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_second_of_a_kind_is_that_of_transformers_and_only_its_tensors_are_read(pairs, opened, kind, dtype):
    first, second = pairs[kind]
    for path in (first, second, second):
        model, missing = built(LOADERS[kind], path, dtype)
        assert not missing
    assert opened == [first]
    same(model, theirs(LOADERS[kind], second, dtype))
    if kind == "tied":
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_it_reads_and_is_written_like_any_other(pairs, tmp_path):
    first, second = pairs["untied"]
    tokenizer = create(ModelSpec(**SIZES), [TEXT], 0)[1]
    read = []
    for number in range(2):
        model = load_policy(second, "float32")
        read.append(response_logprobs(model, [[5, 6, 7]], [[8, 9]]).logprobs)
        save(model, tokenizer, tmp_path / str(number))
        load_policy(first, "float32")
    assert torch.equal(*read)
    files = {file.name: file.read_bytes() for file in (tmp_path / "0").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "1").iterdir()}


def test_tensors_begin_where_torchs_own_do_though_those_of_the_file_do_not(pairs):
    def places(model):
        return {of.data_ptr() % 64 for of in model.state_dict().values()}

    assert places(theirs(AutoModelForCausalLM, pairs["untied"][0])) != {0}
    for _ in ("read by transformers", "filled"):
        assert places(built(AutoModelForCausalLM, pairs["untied"][0], torch.float32)[0]) == {0}


def test_models_have_weights_of_their_own(pairs):
    kept, other = (built(AutoModelForCausalLM, pairs["untied"][0], torch.float32)[0] for _ in range(2))
    with torch.no_grad():
        for of in other.parameters():
            of.zero_()
    other.config.vocab_size = 7
    another = built(AutoModelForCausalLM, pairs["untied"][0], torch.float32)[0]
    same(kept, theirs(AutoModelForCausalLM, pairs["untied"][0]))
    same(another, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_model_is_given_the_weights_of_another_where_it_lies(pairs, opened, kind, dtype):
    (first, second), loader = pairs[kind], LOADERS[kind]
    for model in (built(loader, first, dtype)[0], built(loader, first, dtype)[0]):  # transformers' own, and a copy
        places = [of.data_ptr() for of in model.state_dict().values()]
        assert refilled(model, loader, second, dtype)
        same(model, theirs(loader, second, dtype))
        assert [of.data_ptr() for of in model.state_dict().values()] == places
        assert model.config._name_or_path == str(second)
    assert opened[:1] == [first] and first not in opened[1:]


def test_a_model_that_is_not_alike_is_given_nothing(pairs):
    (first, second), loader = pairs["untied"], AutoModelForCausalLM
    model = built(loader, first, torch.float32)[0]
    assert not refilled(model, loader, pairs["tied"][1], torch.float32)
    assert not refilled(model, loader, second, torch.bfloat16)
    assert not refilled(theirs(loader, first), loader, second, torch.float32), "another's model"
    same(model, theirs(loader, first))


@pytest.mark.parametrize("change", ["config", "generation", "dtype", "names", "loader", "wanted"])
def test_one_that_is_not_alike_is_built_anew(pairs, opened, tmp_path, change):
    first, other = pairs["untied"][0], tmp_path / "other"
    built(AutoModelForCausalLM, first, torch.float32)
    shutil.copytree(pairs["untied"][1], other)
    tensors, wanted, loader = load_file(other / "model.safetensors"), torch.float32, AutoModelForCausalLM
    if change in ("config", "generation"):
        file = other / ("config.json" if change == "config" else "generation_config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": 3}))
    elif change == "dtype":
        save_file({name: of.bfloat16() for name, of in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    elif change == "names":
        tensors["model.another"] = tensors.pop("lm_head.weight")
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
    elif change == "loader":
        loader = AutoModelForTokenClassification
    else:
        wanted = torch.bfloat16
    for count in (1, 2):
        model, missing = built(loader, other, wanted)
        assert (missing == {"lm_head.weight"}) == (change == "names")
        assert model.dtype == wanted
        # What lacks a tensor is no template for others.
        assert opened == [first] + [other] * (count if change in ("names", "loader") else 1)


def test_a_damaged_file_is_told_as_transformers_tells_it(pairs, tmp_path):
    built(AutoModelForCausalLM, pairs["untied"][0], torch.float32)
    shutil.copytree(pairs["untied"][1], tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)header|incomplete|safetensor") as ours:
        built(AutoModelForCausalLM, tmp_path / "other", torch.float32)
    with pytest.raises(type(ours.value)):
        theirs(AutoModelForCausalLM, tmp_path / "other")


@pytest.mark.parametrize("family", [*sorted(PACKED), "bloom", "qwen3_moe", "mixtral"])
def test_of_every_family_the_second_is_that_of_transformers(family, tmp_path, opened):
    config = AutoConfig.for_model(family)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 128, "num_experts": 2,
        "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    }  # fmt: skip
    known = {name: value for name, value in sizes.items() if hasattr(config, name)}
    config = type(config)(**known, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    for seed in range(2):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(seed))
        model = built(AutoModelForCausalLM, tmp_path / str(seed), torch.float32)[0]
    if family in PACKED - {"gpt_neox"}:  # whose head has another name in the files
        assert opened == [tmp_path / "0"]
    expected = theirs(AutoModelForCausalLM, tmp_path / "1")
    same(model, expected)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, expected(tokens).logits, atol=1e-5)
