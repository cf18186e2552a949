"""The average of the weights: its formula, going on, and not being in the way of the policy it lies in."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.artifacts import Artifact
from pipeline.contracts import POLICY
from pipeline.errors import ArtifactError
from pipeline.models import checkpoint
from pipeline.models.fresh import ModelSpec, create
from pipeline.training.averaging import FOLDER, Average

SPEC = ModelSpec(layers=1, width=32, heads=1, kv_heads=1)


def moved(model, generator):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return [p.detach().double() for p in model.parameters()]


@pytest.mark.parametrize("tied", [True, False])
def test_it_follows_the_formula_and_goes_on_from_what_was_saved(tmp_path, tied):
    model, tokenizer = create(SPEC.model_copy(update={"tied": tied}), ["abc"], 0)
    generator = torch.Generator().manual_seed(0)
    wanted = [p.detach().double() for p in model.parameters()]
    for place, before in (("one", "nothing"), ("two", "one")):
        average = Average(model, 0.9, tmp_path / before)
        for step in range(3):
            wanted = [0.9 * e + 0.1 * w for e, w in zip(wanted, moved(model, generator), strict=True)]
            assert average.after_step(step) is False
        checkpoint.save(model, tokenizer, tmp_path / place)
        average.save(tokenizer, tmp_path / place)
    for found, value in zip(
        AutoModelForCausalLM.from_pretrained(tmp_path / "two" / FOLDER).parameters(), wanted, strict=True
    ):
        assert torch.allclose(found.double(), value, rtol=1e-5, atol=1e-6)


def test_it_is_a_checkpoint_of_its_own_and_leaves_the_policy_as_it_was(tmp_path):
    model, tokenizer = create(SPEC, ["abc"], 0)
    checkpoint.save(model, tokenizer, tmp_path / "policy")
    alone, bytes_alone = checkpoint.inspect(tmp_path / "policy"), Artifact.open(tmp_path / "policy", POLICY)
    average = Average(model, 0.5, tmp_path / "policy")
    moved(model, torch.Generator().manual_seed(0))
    average.after_step(1)
    average.save(tokenizer, tmp_path / "policy")
    assert checkpoint.inspect(tmp_path / "policy") == alone == checkpoint.inspect(tmp_path / "policy" / FOLDER)
    both = Artifact.open(tmp_path / "policy", POLICY)
    assert {f"{FOLDER}/config.json", f"{FOLDER}/model.safetensors"} <= set(both.manifest.files)
    assert both.manifest.digest != bytes_alone.manifest.digest


def test_half_precision_weights_are_averaged_in_single_precision(tmp_path):
    model, tokenizer = create(SPEC, ["abc"], 0)
    average = Average(model.bfloat16(), 0.999, tmp_path)
    assert {value.dtype for value in average.state().tensors.values()} == {torch.float32}
    average.save(tokenizer, tmp_path)
    assert checkpoint.inspect(tmp_path / FOLDER).dtypes == ("float32",)


def test_the_average_of_another_model_is_refused(tmp_path):
    other, tokenizer = create(SPEC.model_copy(update={"width": 64}), ["abc"], 0)
    checkpoint.save(other, tokenizer, tmp_path / FOLDER)
    model, _ = create(SPEC, ["abc"], 0)
    with pytest.raises(ArtifactError, match="not one of this policy's weights"):
        Average(model, 0.9, tmp_path)
