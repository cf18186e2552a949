"""`rlhf plan`: an iteration reckoned, beside what a run has measured."""

import json

import pytest

from flows.planning import memory, plan, refuse_what_cannot_fit
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.estimate import Shape
from pipeline.experiment import Experiment
from pipeline.models.lora import Lora

BIG = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "num_hidden_layers": 64,
    "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648,
}  # fmt: skip


@pytest.fixture
def big(desk, tmp_path):
    """The small experiment with a policy of 32 billion parameters, of which there is the config."""
    (tmp_path / "config.json").write_text(json.dumps(BIG))
    return Experiment.load(desk.experiment, [f"models.policy={tmp_path}"])


def test_what_was_reckoned_is_near_what_was_made(finished):
    desk, _ = finished
    experiment = Experiment.load(desk.experiment)
    made = plan(experiment, desk.folder / "runs" / "small", "core", 2, None)
    assert set(made.measured) - {"label"} == set(made.steps) - {"label"}
    for name, (size, _) in made.measured.items():
        rounds = 2 if name in ("rollout", "label") else 1
        assert size <= rounds * made.steps[name].written, name
    checkpoint = made.measured["update"][0]
    tokenizer = 20_000
    assert made.steps["update"].written == pytest.approx(checkpoint, rel=0.15, abs=tokenizer)


def test_the_table_says_what_breaks_first(big, desk, tmp_path):
    words = ("plan", "small.toml", "--set", f"models.policy={tmp_path}")
    assert "activations of a micro-batch: 365 GB" in desk.rlhf(*words, "--count", "64").stdout
    words = (*words, "--set", "resources.micro_batch_tokens=1024")
    told = desk.rlhf(*words, "--count", "1").stdout
    assert f"{Shape.of(BIG).parameters:,}" in told
    assert "memory of the update: give it" in told
    assert "memory of the sampler" in desk.rlhf(*words, "--count", "16", "--set", "resources.dtype=float32").stdout


def test_a_model_that_cannot_fit_is_refused_before_the_run(big, desk, tmp_path):
    refuse_what_cannot_fit(Experiment.load(desk.experiment), memory())
    with pytest.raises(ExperimentError, match=r"an update needs 524 GB .*[\s\S]*resources\.launcher=torchrun"):
        refuse_what_cannot_fit(big, 80e9)
    refuse_what_cannot_fit(big, 8 * 80e9)
    scale = big.scale.model_copy(update={"lora": Lora(rank=16)})
    with pytest.raises(ExperimentError, match="an update needs 133 GB"):
        refuse_what_cannot_fit(big.model_copy(update={"scale": scale}), 80e9)


def test_wrong_requests_are_told(desk, tmp_path, big):
    experiment = Experiment.load(desk.experiment)
    with pytest.raises(ExperimentError, match="one of a100, h100"):
        plan(experiment, tmp_path, "tpu", 1, None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="does not tell the shape"):
        plan(big, tmp_path, "h100", 1, None)
    refuse_what_cannot_fit(big, 1.0)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"check models\.policy"):
        plan(big, tmp_path, "h100", 1, None)
