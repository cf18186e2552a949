"""Checkpoints: what is saved is loaded, what is damaged is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ArtifactError
from pipeline.models.checkpoint import inspect, load_policy, save
from pipeline.models.fresh import ModelSpec, create


def edit(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def edit_config(checkpoint, **changes):
    config = json.loads((checkpoint / "config.json").read_text())
    config.update(changes)
    (checkpoint / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def test_inspect_says_what_is_there(policy, checkpoint):
    model, tokenizer = policy
    facts = inspect(checkpoint)
    assert facts.architecture == "Qwen3ForCausalLM"
    assert (facts.layers, facts.width, facts.max_position) == (2, 64, 128)
    assert facts.vocab_size == len(tokenizer)
    assert not facts.tied
    assert facts.end_ids == (tokenizer.eos_token_id,)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.dtypes == ("float32",)
    assert facts.bytes == (checkpoint / "model.safetensors").stat().st_size


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_loaded(texts, tmp_path, tied, capfd):
    model, tokenizer = create(ModelSpec(layers=1, width=32, heads=1, kv_heads=1, tied=tied), texts, 1)
    save(model, tokenizer, tmp_path / "a" / "b")
    assert inspect(tmp_path / "a" / "b").tied == tied
    loaded = load_policy(tmp_path / "a" / "b", "float32")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not loaded.training
    again = AutoTokenizer.from_pretrained(tmp_path / "a" / "b")
    messages = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[2]}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert capfd.readouterr() == ("", "")


def test_plain_transformers_loads_it_with_nothing_missing(policy, checkpoint):
    _, loading = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(checkpoint).get_vocab() == policy[1].get_vocab()


def test_saving_twice_writes_the_same_bytes(policy, checkpoint, tmp_path):
    save(load_policy(checkpoint, "float32"), AutoTokenizer.from_pretrained(checkpoint), tmp_path / "again")
    for file in checkpoint.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_no_path_of_this_machine_is_saved(checkpoint, tmp_path):
    again = tmp_path / "again"
    save(load_policy(checkpoint, "float32"), AutoTokenizer.from_pretrained(checkpoint), again)
    for file in again.glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name


def test_generation_config_names_every_end_token_and_nothing_about_sampling(policy, tmp_path):
    model, tokenizer = policy
    kept = model.generation_config
    save(model, tokenizer, tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == [tokenizer.eos_token_id]
    assert written["pad_token_id"] == tokenizer.pad_token_id
    assert set(written) <= {"eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
    assert model.generation_config is kept


def test_the_models_other_end_tokens_are_kept(policy, checkpoint, tmp_path):
    model = load_policy(checkpoint, "float32")
    model.generation_config.eos_token_id = [7, 1]
    save(model, policy[1], tmp_path / "more")
    assert inspect(tmp_path / "more").end_ids == (7, 1)


def test_bfloat16_is_kept_by_auto(checkpoint, policy, tmp_path):
    save(load_policy(checkpoint, "bfloat16"), policy[1], tmp_path / "half")
    assert inspect(tmp_path / "half").dtypes == ("bfloat16",)
    assert load_policy(tmp_path / "half", "auto").dtype == torch.bfloat16
    assert load_policy(tmp_path / "half", "float32").dtype == torch.float32


def test_shards_are_read_whole(policy, tmp_path):
    save(*policy, tmp_path)
    policy[0].save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for file in (tmp_path / "shards").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert inspect(tmp_path).parameters == sum(p.numel() for p in policy[0].parameters())
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match="the index promises"):
        inspect(tmp_path)


def test_a_path_that_is_no_directory_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="no such checkpoint directory"):
        inspect(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        inspect(checkpoint)


def test_a_missing_tokenizer_is_named(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="no tokenizer"):
        inspect(checkpoint)


def test_no_tensors_at_all_is_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors"):
        inspect(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_not_json_is_named(checkpoint, text):
    (checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="not") as caught:
        inspect(checkpoint)
    assert caught.value.where.endswith("config.json")


@pytest.mark.parametrize("architectures", [["Qwen3ForSequenceClassification"], ["BertModel"], [], "gone"])
def test_another_architecture_is_refused(checkpoint, architectures):
    edit_config(checkpoint, architectures=architectures)
    with pytest.raises(ArtifactError, match="not a causal language model"):
        inspect(checkpoint)


def test_a_config_that_leaves_things_out_is_refused(checkpoint):
    edit_config(checkpoint, vocab_size="gone")
    with pytest.raises(ArtifactError, match="does not say vocab_size"):
        inspect(checkpoint)


@pytest.mark.parametrize("cut", [1, 1000, 10**9])
def test_a_truncated_file_is_named(checkpoint, cut):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: -min(cut, weights.stat().st_size - 20)])
    with pytest.raises(ArtifactError, match="not a whole safetensors file") as caught:
        inspect(checkpoint)
    assert caught.value.where == str(weights)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_named(checkpoint, value):
    edit(checkpoint, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 5].fill_(value))
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 of"):
        inspect(checkpoint)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", "missing in layer 1"),
        ("model.layers.0.self_attn.q_norm.weight", "missing in layer 0"),
        ("lm_head.weight", "no lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_named(checkpoint, name, message):
    edit(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(ArtifactError, match=message):
        inspect(checkpoint)
    with pytest.raises(ArtifactError, match="no tensor for"):
        load_policy(checkpoint, "float32")


def test_a_missing_layer_is_named(checkpoint):
    edit_config(checkpoint, num_hidden_layers=3)
    with pytest.raises(ArtifactError, match=r"the config says 3 layers, the files have \[0, 1\]"):
        inspect(checkpoint)


def test_another_vocabulary_is_named(checkpoint):
    edit_config(checkpoint, vocab_size=999)
    with pytest.raises(ArtifactError, match=r"\[999, 64\]"):
        inspect(checkpoint)


def test_loading_what_is_not_there_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="cannot load the policy"):
        load_policy(tmp_path, "float32")
