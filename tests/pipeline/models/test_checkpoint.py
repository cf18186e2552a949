"""Checkpoints: what is saved is loaded, what is damaged is named."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from pipeline.errors import ArtifactError, ExperimentError
from pipeline.models.checkpoint import (
    HEAD_STD,
    fresh_critic,
    fresh_reward_model,
    inspect,
    load_critic,
    load_policy,
    load_reward_model,
    reward_bias,
    save,
)
from pipeline.models.forward import response_scores
from pipeline.models.fresh import ModelSpec, create

LOAD = {"policy": load_policy, "reward_model": load_reward_model, "critic": load_critic}
CLASS = {
    "policy": AutoModelForCausalLM,
    "reward_model": AutoModelForSequenceClassification,
    "critic": AutoModelForTokenClassification,
}
HEADED = ["reward_model", "critic"]


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


def test_inspect_believes_what_it_has_seen_until_a_file_is_another(checkpoint):
    facts, weights = inspect(checkpoint), (checkpoint / "model.safetensors").read_bytes()
    assert inspect(checkpoint) is facts
    with pytest.raises(ArtifactError, match="not a token classification model"):
        inspect(checkpoint, "critic")
    edit(checkpoint, lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
            inspect(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(weights)
    assert inspect(checkpoint) == facts
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="tokenizer"):
        inspect(checkpoint)


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


@pytest.mark.parametrize("kind", HEADED)
def test_a_model_with_a_head_is_inspected_and_loaded_by_us_and_by_plain_transformers(judges, policy, kind, capfd):
    facts = inspect(judges / kind, kind)
    assert facts.architecture == {"reward_model": "Qwen3ForSequenceClassification"}.get(
        kind, "Qwen3ForTokenClassification"
    )
    assert (facts.layers, facts.width, facts.vocab_size) == (2, 64, len(policy[1]))
    loaded = LOAD[kind](judges / kind, "float32")
    assert not loaded.training
    assert facts.parameters == sum(p.numel() for p in loaded.parameters())
    assert loaded.state_dict()["model.layers.1.mlp.up_proj.weight"].equal(policy[0].model.layers[1].mlp.up_proj.weight)
    assert capfd.readouterr() == ("", "")
    plain, loading = CLASS[kind].from_pretrained(judges / kind, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert plain.num_labels == 1
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("kind", HEADED)
def test_saving_a_model_with_a_head_twice_writes_the_same_bytes(judges, policy, tmp_path, kind):
    model = LOAD[kind](judges / kind, "float32")
    save(model, policy[1], tmp_path / "again")
    assert sorted(file.name for file in (judges / kind).iterdir()) == sorted(
        f.name for f in (tmp_path / "again").iterdir()
    )
    for file in (judges / kind).iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("given", CLASS)
@pytest.mark.parametrize("wanted", CLASS)
def test_a_model_of_another_kind_is_refused(judges, given, wanted):
    if given == wanted:
        inspect(judges / given, wanted)
        return
    name = {"policy": "a causal", "reward_model": "a sequence classification", "critic": "a token classification"}[
        wanted
    ]
    with pytest.raises(ArtifactError, match=f"not {name}") as caught:
        inspect(judges / given, wanted)
    assert wanted.replace("_", " ") in caught.value.do
    with pytest.raises(ArtifactError, match=r"no tensor for|not a"):
        LOAD[wanted](judges / given, "float32")


def test_a_tied_policy_does_not_hide_that_a_reward_model_is_none(texts, tmp_path):
    save(*create(ModelSpec(layers=1, width=32, heads=1, kv_heads=1, tied=True), texts, 1), tmp_path / "policy")
    save(
        fresh_reward_model(tmp_path / "policy", 0), AutoTokenizer.from_pretrained(tmp_path / "policy"), tmp_path / "rm"
    )
    assert inspect(tmp_path / "rm", "reward_model").tied
    with pytest.raises(ArtifactError, match="not a causal language model"):
        load_policy(tmp_path / "rm", "float32")


@pytest.fixture
def copied(judges, tmp_path):
    return lambda kind: shutil.copytree(judges / kind, tmp_path / kind)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("reward_model", lambda t: t.pop("score.weight"), r"score\.weight: missing, expected \[1, 64\]"),
        ("critic", lambda t: t.update({"score.weight": torch.zeros(2, 64)}), r"score\.weight: \[2, 64\]"),
        ("critic", lambda t: t.update({"score.bias": torch.zeros(2)}), r"score\.bias: \[2\], expected \[1\]"),
        ("critic", lambda t: t["score.bias"].fill_(torch.nan), r"score\.bias has 1 of 1 numbers not finite"),
        ("reward_model", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing in layer 1"),
    ],
)
def test_a_damaged_head_is_named(copied, kind, change, message):
    path = copied(kind)
    edit(path, change)
    with pytest.raises(ArtifactError, match=message):
        inspect(path, kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "the config has 2 labels"),
        ({"id2label": "gone", "num_labels": 3}, "the config has 3 labels"),
        ({"id2label": "gone"}, "the config has 2 labels"),
        ({"reward_bias": float("nan")}, "reward_bias: nan"),
        ({"reward_bias": "much"}, "reward_bias: 'much'"),
    ],
)
def test_a_config_that_does_not_fit_a_reward_model_is_named(copied, change, message):
    path = copied("reward_model")
    edit_config(path, **change)
    with pytest.raises(ArtifactError, match=message):
        inspect(path, "reward_model")


def test_a_number_of_labels_is_as_good_as_their_names(copied):
    path = copied("reward_model")
    edit_config(path, id2label="gone", label2id="gone", num_labels=1)
    assert inspect(path, "reward_model").width == 64
    assert load_reward_model(path, "float32").num_labels == 1


@pytest.mark.parametrize("make", [fresh_reward_model, fresh_critic])
def test_a_new_head_is_a_function_of_the_seed_and_of_nothing_else(judges, make, capfd):
    torch.manual_seed(5)
    one = make(judges / "policy", 7)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(6)
    same, other = make(judges / "policy", 7), make(judges / "policy", 8)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.score.weight, other.score.weight)
    assert torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert one.score.weight.std().item() == pytest.approx(HEAD_STD, rel=0.4)
    assert one.score.bias is None or one.score.bias.item() == 0
    assert reward_bias(one) == 0 and one.dtype == torch.float32
    assert capfd.readouterr() == ("", "")


def test_the_critic_of_a_reward_model_says_what_the_reward_model_says(judges, policy, tmp_path):
    critic, start = fresh_critic(judges / "reward_model", 0), load_reward_model(judges / "reward_model", "float32")
    assert torch.equal(critic.score.weight, start.score.weight)
    assert critic.score.bias.item() == reward_bias(start) == -0.75
    save(critic, policy[1], tmp_path / "critic")
    assert "reward_bias" not in json.loads((tmp_path / "critic" / "config.json").read_text())
    assert inspect(tmp_path / "critic", "critic").layers == 2


def test_the_critic_of_a_critic_is_that_critic(judges):
    again, critic = fresh_critic(judges / "critic", 9), load_critic(judges / "critic", "float32")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in critic.state_dict().items())


def test_a_reward_model_without_the_key_has_no_bias(copied):
    path = copied("reward_model")
    edit_config(path, reward_bias="gone")
    inspect(path, "reward_model")
    assert reward_bias(load_reward_model(path, "float32")) == 0.0
    assert fresh_critic(path, 0).score.bias.item() == 0.0


def test_a_head_is_not_put_on_what_is_no_policy(judges, copied):
    with pytest.raises(ArtifactError, match="not a causal language model"):
        fresh_reward_model(judges / "critic", 0)
    path = copied("policy")
    edit_config(path, architectures=["BertModel"])
    with pytest.raises(ArtifactError, match=r"neither policy nor .*BertModel"):
        fresh_critic(path, 0)
    edit_config(path, architectures=["Qwen3ForCausalLM"])
    edit(path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ArtifactError, match=r"no tensor for.*model\.norm\.weight"):
        fresh_critic(path, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=8), "has no head named score"),
        (
            Gemma3TextConfig(
                num_hidden_layers=1, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
                intermediate_size=8, vocab_size=8,
            ),
            "no critic can be made of a gemma3_text",
        ),
    ],
    ids=["gpt2", "gemma3"],
)  # fmt: skip
def test_a_family_without_such_a_head_is_refused(tmp_path, config, message):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    edit_config(tmp_path, vocab_size=8, hidden_size=8, num_hidden_layers=1, max_position_embeddings=8)
    with pytest.raises(ExperimentError, match=message):
        fresh_critic(tmp_path, 0)


def without_padding():
    """A tokenizer whose special tokens all end texts or may."""
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1} | {chr(97 + i): i + 2 for i in range(26)}, "<unk>"))
    tokenizer.add_special_tokens(["<eos>", "<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


TEXTS = [[5, 6, 7], [9], [4] * 20, [8, 3]], [[10, 11, 1], [12] * 9, [7], [13, 2]]
"""Two end with a letter, one with the end token of `policy`, one with its unknown character; unlike lengths."""


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", "<unk>", None])
@pytest.mark.parametrize("own", [0, 1, 2, 9, None], ids=["padding", "end", "unknown", "letter", "none"])
def test_plain_transformers_scores_what_we_score_whatever_padded_before(judges, tmp_path, pad, own):
    tokenizer = AutoTokenizer.from_pretrained(judges / "policy")
    tokenizer.pad_token = pad
    model = load_reward_model(judges / "reward_model", "float32")
    model.config.pad_token_id = own
    save(model, tokenizer, tmp_path)
    assert (model.config.pad_token_id, tokenizer.pad_token) == (own, pad)
    plain, saved = AutoModelForSequenceClassification.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert plain.config.pad_token_id == saved.pad_token_id == 0
    rows = [[*prompt, *response] for prompt, response in zip(*TEXTS, strict=True)]
    with torch.no_grad():
        ours = response_scores(load_reward_model(tmp_path, "float32"), *TEXTS)
        together = plain(**saved.pad({"input_ids": rows}, return_tensors="pt")).logits[:, 0]
        alone = torch.cat([plain(torch.tensor([row])).logits[:, 0] for row in rows])
    assert torch.allclose(together + reward_bias(plain), ours, atol=1e-5)
    assert torch.allclose(alone + reward_bias(plain), ours, atol=1e-5)
    assert ours.std() > 0.1


@pytest.mark.parametrize("pad", ["<eos>", "<unk>", None])
@pytest.mark.parametrize("family", [LlamaConfig, GemmaConfig], ids=["llama", "gemma"])
def test_without_a_token_to_pad_with_plain_transformers_scores_one_text_and_refuses_more(tmp_path, pad, family):
    tokenizer = without_padding()
    tokenizer.pad_token = pad
    config = family(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=32, num_labels=1, bos_token_id=None, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    save(AutoModelForSequenceClassification.from_config(config).eval(), tokenizer, tmp_path)
    plain, saved = AutoModelForSequenceClassification.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert plain.config.pad_token_id is saved.pad_token is None
    rows = [[3, 4, 0], [5, 1]]
    with torch.no_grad():
        ours = response_scores(load_reward_model(tmp_path, "float32"), [row[:1] for row in rows], [r[1:] for r in rows])
        alone = torch.cat([plain(torch.tensor([row])).logits[:, 0] for row in rows])
        with pytest.raises(ValueError, match="no padding token"):
            plain(torch.tensor([[3, 4, 0], [5, 1, 0]]))
    assert torch.allclose(alone, ours, atol=1e-5)
    with pytest.raises(ValueError, match="does not have a padding token"):
        saved.pad({"input_ids": rows})


def test_no_end_token_of_a_policy_pads_the_reward_model_made_of_it(judges, policy, copied, tmp_path):
    path = copied("policy")
    ends = json.loads((path / "generation_config.json").read_text()) | {"eos_token_id": [1, 0]}
    (path / "generation_config.json").write_text(json.dumps(ends))
    for kind, make in (("reward_model", fresh_reward_model), ("critic", fresh_critic)):
        save(make(path, 0), policy[1], tmp_path / "saved")
        assert inspect(tmp_path / "saved", kind).end_ids == (1, 0)
        assert CLASS[kind].from_pretrained(tmp_path / "saved").config.pad_token_id is None
        again = LOAD[kind](tmp_path / "saved", "float32")
        save(again, policy[1], tmp_path / "again")
        assert CLASS[kind].from_pretrained(tmp_path / "again").config.pad_token_id is None


def test_a_token_that_the_model_does_not_have_pads_nothing(judges, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(judges / "policy")
    tokenizer.add_special_tokens({"pad_token": "<another pad>"})
    model = load_reward_model(judges / "reward_model", "float32")
    assert tokenizer.pad_token_id == model.config.vocab_size
    save(model, tokenizer, tmp_path)
    assert load_reward_model(tmp_path, "float32").config.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<pad>"
