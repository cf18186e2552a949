import json
import shutil

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from pipeline.algorithms.recipe import Recipe
from pipeline.contracts import ADVANTAGES
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.estimate import Shape
from pipeline.models import adapters
from pipeline.models.checkpoint import fresh_reward_model, load_critic, load_policy
from pipeline.models.lora import Lora
from stages.sft import sft
from stages.update import Settings, update
from stages.value import Settings as ValueSettings
from stages.value import value

FOUR = {"rank": 4, "alpha": 8}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def settings(lora=FOUR, minibatches=2, **changes):
    recipe = Recipe.load("grpo")
    plan = recipe.update.model_copy(update={"minibatches": minibatches, "epochs": 1})
    return Settings.of(None, {"loss": recipe.loss, "update": plan, "learning_rate": 1e-2, "lora": lora, **changes})


@pytest.fixture(scope="module")
def twice(room, advantages, policy):
    """The policy, trained with adapters, and on from there."""
    first = update.run(room / "adapters" / "0", settings(), advantages=advantages.path, policy=policy.path)
    second = update.run(room / "adapters" / "1", settings(), advantages=advantages.path, policy=first.path)
    return first, second


def tensors(path):
    return load_file(path / "model.safetensors")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def test_only_the_layers_change_and_only_by_so_many_ranks(policy, twice):
    before, after = tensors(policy.path), tensors(twice[1].path)
    assert before.keys() == after.keys()
    changed = 0
    for name, weights in before.items():
        difference = after[name] - weights
        if name.removesuffix(".weight").endswith(LINEAR):
            spectrum = torch.linalg.svdvals(difference.double())
            assert spectrum[0] > 1e-4 and spectrum[4] < 1e-4 * spectrum[0], name
            changed += 1
        else:
            assert not difference.any(), name
    assert changed == len(LINEAR) * 2


def test_what_is_written_is_what_was_trained(policy, twice):
    for made in twice:
        base = AutoModelForCausalLM.from_pretrained(policy.path)
        adapted = PeftModel.from_pretrained(base, made.path / "trainer").eval()
        torch.testing.assert_close(logits(adapted), logits(load_policy(made.path, "float32")), rtol=0, atol=1e-5)


def test_it_goes_on_from_the_adapters_and_their_moments(policy, twice):
    first, second = twice
    model = adapters.attached(load_policy(first.path, "float32"), Lora(**FOUR), 0, first.path / "trainer")
    before = tensors(policy.path)
    for name, layer in model.named_modules():
        if name.endswith(LINEAR):
            found = layer.base_layer.weight
            torch.testing.assert_close(found, before[f"{name}.weight"], rtol=0, atol=1e-6)
    trained = [name for name, weights in model.named_parameters() if weights.requires_grad]
    assert len(trained) == 2 * 2 * len(LINEAR) and all(".lora_" in name for name in trained)
    shape = Shape.of(json.loads((policy.path / "config.json").read_text()))
    assert sum(weights.numel() for weights in model.parameters() if weights.requires_grad) == shape.adapters(4)
    moments = load_file(second.path / "trainer" / "optimizer.safetensors")
    assert {int(key.partition(".")[0]) for key in moments} == set(range(len(trained)))
    assert float(moments["0.step"]) == 4 and second.stats["steps"] == 4


def test_the_same_adapters_have_the_same_bytes(room, advantages, policy, twice):
    again = update.run(room / "adapters" / "again", settings(), advantages=advantages.path, policy=policy.path)
    assert again.manifest.digest == twice[0].manifest.digest
    other = update.run(room / "adapters" / "other", settings(seed=1), advantages=advantages.path, policy=policy.path)
    assert other.manifest.digest != again.manifest.digest
    written = json.loads((again.path / "trainer" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(LINEAR) and (written["r"], written["lora_alpha"]) == (4, 8)


def test_one_that_was_killed_goes_on_with_the_same_bits(survives, advantages, policy):
    survives(
        update, settings(minibatches=5, save_every=2), before=4, saved=2, advantages=advantages.path, policy=policy.path
    )


def test_a_critic_trains_its_head_as_a_whole(tmp_path, advantages, by_hand, policy):
    rows = advantages.table().to_pylist()
    returned = by_hand(ADVANTAGES, [row | {"returns": row["advantages"]} for row in rows])
    learning = ValueSettings.of(
        None, {"loss": {"kind": "value_squared"}, "minibatches": 2, "epochs": 1, "learning_rate": 1e-2, "lora": FOUR}
    )
    first = value.run(tmp_path / "0", learning, advantages=returned.path, policy=policy.path)
    second = value.run(tmp_path / "1", learning, advantages=returned.path, critic=first.path)
    before, one, two = (tensors(path) for path in (policy.path, first.path, second.path))
    assert not torch.equal(one["score.weight"], two["score.weight"])
    assert torch.equal(two["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert load_critic(second.path, "float32").num_labels == 1


def test_sft_and_rewards_begin_with_adapters_of_their_own(tmp_path, demonstrations, sft_settings, policy, twice):
    made = sft.run(
        tmp_path / "sft", sft_settings(lora=FOUR, learning_rate=1e-2), demonstrations=demonstrations.path,
        policy=twice[0].path,
    )  # fmt: skip
    assert not (made.path / "trainer").exists()
    before, after = tensors(twice[0].path), tensors(made.path)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    model = adapters.attached(fresh_reward_model(policy.path, 0), Lora(), 0)
    assert {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name} == {
        "score.weight", "score.bias",
    } & {name for name, _ in model.named_parameters()}  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "message"),
    [(None, "with adapters of rank 4 and alpha 8, and is to go on without"), ({"rank": 2}, "rank 2 and alpha 32")],
)
def test_a_training_does_not_go_on_otherwise(tmp_path, advantages, twice, lora, message):
    with pytest.raises(ArtifactError, match=message) as error:
        update.run(tmp_path / "out", settings(lora), advantages=advantages.path, policy=twice[0].path)
    assert "as before" in error.value.do


def test_nor_one_that_had_none_with_some(tmp_path, advantages, policy):
    plain = update.run(tmp_path / "plain", settings(None), advantages=advantages.path, policy=policy.path)
    with pytest.raises(ArtifactError, match="trained without adapters, and is to go on with adapters of rank 4"):
        update.run(tmp_path / "out", settings(), advantages=advantages.path, policy=plain.path)


def test_damaged_adapters_are_told(tmp_path, policy, twice):
    shutil.copytree(twice[0].path / "trainer", tmp_path / "trainer")
    place, model = tmp_path / "trainer" / "adapter_model.safetensors", load_policy(twice[0].path, "float32")
    found = load_file(place)
    name = next(iter(found))
    save_file({**found, "base_model.model.elsewhere.lora_A.weight": torch.zeros(1)}, place)
    with pytest.raises(ArtifactError, match="of layers that this model has not"):
        adapters.attached(model, Lora(**FOUR), 0, place.parent)
    save_file({key: value for key, value in found.items() if key != name}, place)
    with pytest.raises(ArtifactError, match="unusable adapters: 'base_model"):
        adapters.attached(load_policy(twice[0].path, "float32"), Lora(**FOUR), 0, place.parent)
    (place.parent / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="unusable adapters"):
        adapters.attached(load_policy(twice[0].path, "float32"), Lora(**FOUR), 0, place.parent)


def test_what_cannot_be_adapted_is_refused(tmp_path, advantages, policy):
    other = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(ExperimentError, match="GPT2LMHeadModel has no linear layers"):
        adapters.attached(other, Lora(), 0)
    averaged = Recipe.load("grpo").update.model_copy(update={"ema": 0.9})
    with pytest.raises((ExperimentError, ValidationError), match=r"update\.ema averages whole weights"):
        settings(update=averaged)
