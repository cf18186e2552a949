"""`rlhf plan`: an iteration reckoned, beside what a run has measured; and what a run is told before it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.planning import Room, amount, here, plan, refuse_what_cannot_fit
from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.estimate import Shape, Training, hosted
from pipeline.experiment import Experiment
from stages.ingest import Settings as IngestSettings
from stages.ingest import ingest

ROOT = Path(__file__).resolve().parents[2]
BIG = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "num_hidden_layers": 64,
    "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648,
}  # fmt: skip
ONE, EIGHT = Room(80e9, 1, 2e12), Room(80e9, 8, 2e12)
TORCHRUN = 'resources.launcher="torchrun"'
TRAINED_FACTOR = 1.6
"""Between the memory that a training takes and what is reckoned, either way."""


@pytest.fixture
def big(desk, tmp_path):
    """The small experiment with a policy of 32 billion parameters, of which there is the config; with changes."""
    (tmp_path / "config.json").write_text(json.dumps(BIG))
    return lambda *changes, recipe=None: Experiment.load(
        desk.experiment, [f"models.policy={tmp_path}", *changes], recipe
    )


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


def test_tokens_that_were_reckoned_are_those_that_were_sampled(finished):
    desk, _ = finished
    folder = desk.folder / "runs" / "small"
    sampled = Artifact.open(folder / "0001" / "rollouts-0")
    length = sampled.stats["tokens"] / sampled.stats["rows"]
    made = plan(Experiment.load(desk.experiment), folder, "core", 2, length)
    assert sampled.stats["tokens"] == pytest.approx(made.work.tokens * sampled.stats["rows"] / made.work.responses)
    scored, updated = (Artifact.open(folder / "0001" / name) for name in ("scores", "policy"))
    assert scored.stats["rows"] <= made.work.responses
    assert updated.stats["steps"] == 2 * made.work.epochs * made.work.minibatches, "of two iterations"


def test_the_table_says_what_breaks_first(big, desk, tmp_path):
    big()
    words = ("plan", "small.toml", "--set", f"models.policy={tmp_path}", "--set", "resources.dtype=bfloat16")
    told = desk.rlhf(*words, "--count", "1").stdout
    assert f"{Shape.of(BIG).parameters:,}" in told
    assert "memory of update: " in told and "524 GB for weights, gradients and moments" in told
    assert "start-up" in told and "of these, starting processes and reading models" in told
    words = (*words, "--set", TORCHRUN)
    assert "1 x h100, launcher torchrun" in desk.rlhf(*words, "--count", "1").stdout
    assert "checkpoints as files" in desk.rlhf(*words, "--count", "64").stdout
    single = desk.rlhf(*words, "--count", "64", "--set", "resources.dtype=float32").stdout
    assert "memory of rollout" in single and "resources.dtype=bfloat16" in single
    idle = desk.rlhf("plan", "small.toml", "--count", "8", "--set", "resources.launcher=ray").stdout
    assert "work for 8 engines" in idle and "resources.max_num_seqs=" in idle
    shared = desk.rlhf("plan", "small.toml", "--count", "8", "--set", "resources.launchers.update=torchrun").stdout
    assert "launcher inline, of update torchrun" in shared


def test_a_model_that_cannot_fit_is_refused_before_the_run(big):
    half = "resources.dtype=bfloat16"
    with pytest.raises(ExperimentError, match="update needs 536 GB of a device, 524 GB for weights") as refused:
        refuse_what_cannot_fit(big(half), ONE)
    for words in (
        "recompute=true (525 GB)",
        "micro_batch_tokens=24 (525 GB)",
        "offload=true (274 GB)",
        "resources.launchers.update=torchrun on 16",
    ):
        assert words in refused.value.do
    assert "scale.lora={rank=16} (145 GB)" in refused.value.do
    with pytest.raises(ExperimentError, match="update needs 536"):
        refuse_what_cannot_fit(big(half), EIGHT)  # seven of the eight have nothing to do
    assert "of a device's 80 GB" in refuse_what_cannot_fit(big(half, TORCHRUN), Room(80e9, 16, 2e12))
    nodes = 'resources.torchrun=["--nnodes", "1:4", "--nproc_per_node=4"]'
    assert "of a device's 80 GB" in refuse_what_cannot_fit(big(half, TORCHRUN, nodes), Room(80e9, 4, 2e12))
    with pytest.raises(ExperimentError, match=r"rollout needs 131 GB of a device, .* there are 117 GB"):
        refuse_what_cannot_fit(big("scale.lora={rank=16}", "resources.recompute=true"), Room(130e9, 1, 2e12))


def test_a_cluster_elsewhere_is_not_measured_by_this_machine(big):
    changes = ("scale.lora={rank=16}", "resources.recompute=true", "resources.launcher=ray")
    room = Room(140e9, 1, 2e12)
    with pytest.raises(ExperimentError, match="rollout needs 131 GB"):
        refuse_what_cannot_fit(big(*changes), room)
    assert refuse_what_cannot_fit(big(*changes, "resources.ray.address=HOST:6379"), room)


def test_activations_count_and_so_does_a_critic(big):
    changes = ("resources.dtype=bfloat16", "scale.lora={rank=16}", "scale.response_tokens=8000", "scale.groups=4096")
    room = Room(200e9, 1, 2e12)
    with pytest.raises(ExperimentError, match="GB for activations") as refused:
        refuse_what_cannot_fit(big(*changes), room)
    assert "resources.micro_batch_tokens=8008 (" in refused.value.do and "scale.lora" not in refused.value.do
    less = (*changes, "resources.recompute=true", "resources.compute_dtype=bfloat16")
    assert "update 1" in refuse_what_cannot_fit(big(*less), room)
    with pytest.raises(ExperimentError, match="value needs 5") as refused:
        refuse_what_cannot_fit(big(*less, recipe="ppo"), room)
    assert "critic.lora={rank=16} (" in refused.value.do and "scale.lora" not in refused.value.do
    assert "value 1" in refuse_what_cannot_fit(big(*less, "critic.lora={rank=64}", recipe="ppo"), room)


def test_offloaded_moments_have_to_fit_into_the_host(big):
    changes = ("resources.dtype=bfloat16", "resources.offload=true")
    needed = amount(hosted(Shape.of(BIG)))
    with pytest.raises(ExperimentError, match=rf"update needs {needed} of the host's memory.*\n.*resources\.offload"):
        refuse_what_cannot_fit(big(*changes), Room(400e9, 1, 256e9))
    assert "of a device's 400 GB" in refuse_what_cannot_fit(big(*changes), Room(400e9, 1, 600e9))
    with pytest.raises(ExperimentError, match="of the host's memory"):
        refuse_what_cannot_fit(big(*changes), Room(600e9, 0, 600e9))  # device and host are the same
    assert refuse_what_cannot_fit(big(*changes, TORCHRUN), Room(400e9, 8, 600e9))


def test_a_run_begins_with_a_line_about_memory(finished):
    desk, done = finished
    line = refuse_what_cannot_fit(Experiment.load(desk.experiment), here())
    assert line.startswith("  of a device's ") and done.stderr.count(line) == 1


def test_wrong_requests_are_told(desk, tmp_path, big):
    experiment = Experiment.load(desk.experiment)
    with pytest.raises(ExperimentError, match="one of a100, h100"):
        plan(experiment, tmp_path, "tpu", 1, None)
    with pytest.raises(ExperimentError, match=r"--length is 17: .*scale\.response_tokens = 16"):
        plan(experiment, tmp_path, "h100", 1, 17.0)
    shared = big("resources.engine=vllm", "resources.tensor_parallel=4")
    with pytest.raises(ExperimentError, match=r"--count is 2, .*resources\.tensor_parallel = 4"):
        plan(shared, tmp_path, "h100", 2, None)
    (tmp_path / "config.json").write_text(json.dumps({**BIG, "num_experts": 64}))
    with pytest.raises(ExperimentError, match="num_experts = 64: mixtures of experts are not reckoned"):
        plan(shared, tmp_path, "h100", 8, None)
    assert refuse_what_cannot_fit(shared, ONE).startswith("  memory is not reckoned: num_experts = 64")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="does not tell the shape"):
        plan(shared, tmp_path, "h100", 8, None)
    assert "does not tell the shape" in refuse_what_cannot_fit(shared, ONE)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"check models\.policy"):
        plan(shared, tmp_path, "h100", 8, None)


PEAK = """
import runpy
try:
    runpy.run_module("stages.sft", run_name="__main__")
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""
"""Of the process alone: what the system tells its parent counts from the parent's own memory."""


def trained(folder, demonstrations, layers, width):
    """Peak of the memory of a process that fits a new model to demonstrations; and that model's shape."""
    out = folder / f"{layers}-{width}"
    new = f"new={{layers={layers}, width={width}, heads=4, kv_heads=2, ffn=4, max_position=64}}"
    settings = (new, "tokens=64", "batch=64", "learning_rate=1e-4", "micro_batch_tokens=2048")
    words = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "--demonstrations", demonstrations, "--out", out, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak = int(done.stdout.split()[-1]) * 1024
    return peak, Shape.of(json.loads((out / "config.json").read_bytes()))


def test_the_memory_of_a_training_is_near_what_was_reckoned(tmp_path):
    given = {"kind": "demonstrations", "source": "arithmetic", "world": {"terms": [4, 4]}, "count": 192}
    demonstrations = ingest.run(tmp_path / "demonstrations", IngestSettings.of(None, given)).path
    (least, small), (most, large) = (trained(tmp_path, demonstrations, *size) for size in ((1, 32), (4, 384)))
    told = [
        Training(2048).held(shape, None) + Training(2048).activations(shape, 2048 * 0.95) for shape in (small, large)
    ]
    assert (told[1] - told[0]) / TRAINED_FACTOR < most - least < (told[1] - told[0]) * TRAINED_FACTOR
