"""What a run will take, before it is started; and beside it what was measured, where it has been."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.sheets import Sheet
from pipeline.algorithms.bind import bind
from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.estimate import DEVICES, Device, Shape, Step, Training, Work, iteration, trained
from pipeline.experiment import Experiment
from pipeline.models.lora import Lora
from pipeline.storage import MANIFEST

CHARACTERS = 64
"""Tokens of a tokenizer that is still to be made of a text's characters."""
LONG = 0.1
"""Share of an iteration above which moving checkpoints is told as what breaks first."""


@dataclass(frozen=True)
class Plan:
    """An estimate, and what it was made for."""

    shape: Shape
    work: Work
    name: str
    """Of the device."""
    device: Device
    count: int
    training: Training
    steps: Mapping[str, Step]
    measured: Mapping[str, tuple[float, float]]
    """Stage -> bytes and seconds of the last iteration that was run."""


def plan(experiment: Experiment, folder: Path, device: str, count: int, length: float | None) -> Plan:
    """Reckon an iteration on `count` devices; `length` is the mean length of responses, the longest when absent.

    Raises `ExperimentError` for an unknown device or a model whose config does not tell its shape.
    """
    if device not in DEVICES:
        raise ExperimentError(f"--device is {device!r}", do=f"one of {', '.join(DEVICES)}")
    if count < 1:
        raise ExperimentError(f"--count is {count}", do="1 or more")
    recipe, scale = experiment.recipe, experiment.scale
    work = Work(
        responses=scale.groups * recipe.rollout.group_size, prompt_tokens=scale.prompt_tokens,
        response_tokens=length or scale.response_tokens, needs=len(bind(recipe).needs), epochs=recipe.update.epochs,
        critic=recipe.critic is not None,
    )  # fmt: skip
    shape = _shape(experiment)
    dtype = 4 if experiment.resources.dtype == "float32" else 2
    resources = experiment.resources
    training = Training(
        resources.micro_batch_tokens, resources.compute_dtype == "bfloat16", resources.recompute,
        _rank(experiment.scale.lora), _rank(experiment.critic.lora), resources.offload,
    )  # fmt: skip
    steps = iteration(shape, work, DEVICES[device], count, training, dtype)
    return Plan(shape, work, device, DEVICES[device], count, training, steps, _measured(folder))


def _rank(lora: Lora | None) -> int | None:
    return None if lora is None else lora.rank


def _shape(experiment: Experiment) -> Shape:
    if experiment.models.policy is None:
        return _new(experiment.models.new)
    path = Path(experiment.models.policy) / "config.json"
    try:
        return Shape.of(json.loads(path.read_bytes()))
    except OSError as error:
        raise ArtifactError("cannot read the config of the policy", str(path), "check models.policy") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the config does not tell the shape of a llama-like model: {error}", str(path), "name another policy"
        ) from error


def _new(spec: Mapping[str, Any]) -> Shape:
    """Of a model that `sft` will create."""
    from pipeline.models.fresh import ModelSpec

    asked = ModelSpec.model_validate(spec)
    vocabulary = CHARACTERS if asked.tokenizer == "characters" else asked.vocab_size
    return Shape(
        asked.layers, asked.width, asked.heads, asked.kv_heads, asked.width // asked.heads, asked.ffn * asked.width,
        vocabulary, asked.tied,
    )  # fmt: skip


def _measured(folder: Path) -> dict[str, tuple[float, float]]:
    """Bytes and seconds of each stage in the last whole iteration that a run has made."""
    for place in sorted(folder.glob("[0-9][0-9][0-9][0-9]/policy"), reverse=True):
        found: dict[str, tuple[float, float]] = {}
        for path in sorted(place.parent.glob(f"*/{MANIFEST}")):
            made = Artifact.open(path.parent)
            size = float(sum(record.bytes for record in made.manifest.files.values()))
            before = found.get(made.manifest.stage, (0.0, 0.0))
            found[made.manifest.stage] = (before[0] + size, before[1] + made.stats["seconds"])
        return found
    return {}


def sheets(made: Plan, experiment: Experiment) -> list[Sheet]:
    """The estimate as tables: by stage, and in all."""
    where = f"{made.count} x {made.name}"
    header = ["stage", "bytes at most", "seconds", "memory of a device"]
    header += ["measured: bytes", "seconds"] if made.measured else []
    rows = []
    for name, step in made.steps.items():
        row = [name, amount(step.written), f"{step.seconds:,.1f}", amount(step.memory) if step.memory else ""]
        if made.measured:
            size, seconds = made.measured.get(name, (0.0, 0.0))
            row += [amount(size), f"{seconds:,.1f}"]
        rows.append(row)
    return [
        Sheet(f"an iteration of {experiment.recipe.name} on {where}", tuple(header), tuple(map(tuple, rows))),
        Sheet("in all", ("", ""), tuple(_whole(made, experiment))),
    ]


def _whole(made: Plan, experiment: Experiment) -> list[tuple[str, str]]:
    tables = sum(step.written for name, step in made.steps.items() if name not in ("update", "value"))
    checkpoints = sum(step.written for name, step in made.steps.items() if name in ("update", "value"))
    seconds, total = sum(step.seconds for step in made.steps.values()), experiment.scale.iterations
    moved = (checkpoints + made.shape.parameters * 4) / made.device.storage
    return [
        ("parameters", f"{made.shape.parameters:,}"),
        ("tokens of an iteration's responses", f"{made.work.tokens:,.0f}"),
        ("tables of an iteration", amount(tables)),
        ("checkpoints of an iteration, written", amount(checkpoints)),
        (f"{total} iterations, nothing pruned", amount(total * (tables + checkpoints))),
        ("seconds of an iteration", f"{seconds:,.0f}"),
        ("of these, moving checkpoints", f"{moved / seconds:.0%}"),
        ("what breaks first", breaks(made, moved / seconds)),
    ]


def breaks(made: Plan, moving: float) -> str:
    """What stands in the way, and at what size it would not."""
    room = made.device.memory
    sampler = made.steps["rollout"].memory
    held = trained(made.shape, made.training.rank, offload=made.training.offload)
    if made.steps["update"].memory > room:
        activations = made.steps["update"].memory - held / made.count
        if activations > room / 2:
            return (
                f"activations of a micro-batch: {amount(activations)}; lower resources.micro_batch_tokens, or set "
                "resources.recompute"
            )
        return f"memory of the update: give it {-(-held // (room - activations)):.0f} devices (launcher torchrun)"
    if sampler > room:
        return f"memory of the sampler: {amount(sampler)}; bfloat16, or tensor parallel on {-(-sampler // room):.0f}"
    if moving > LONG:
        return f"checkpoints as files: {moving:.0%} of an iteration; storage above {amount(made.device.storage)}/s"
    return "nothing: it fits"


def amount(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def memory() -> float:
    """Bytes of this machine's accelerators together; where it has none, of its own memory."""
    import torch

    cards = range(torch.cuda.device_count())
    return float(
        sum(torch.cuda.get_device_properties(card).total_memory for card in cards) or psutil.virtual_memory().total
    )


def refuse_what_cannot_fit(experiment: Experiment, room: float) -> None:
    """Raise `ExperimentError` where the update cannot fit into `room` bytes: weights, gradients and two moments.

    They are float32, over all processes; activations come on top. A model whose config does not tell its shape passes.
    """
    try:
        shape = _shape(experiment)
    except ArtifactError:
        return
    needed = trained(shape, _rank(experiment.scale.lora), offload=experiment.resources.offload)
    if needed > room:
        raise ExperimentError(
            f"an update needs {amount(needed)} for weights, gradients and moments of {shape.parameters:,} parameters, "
            f"and there are {amount(room)}", "models",
            "take a smaller policy, train adapters (scale.lora={rank=16}), or share the work among more devices: "
            "resources.launcher=torchrun",
        )  # fmt: skip
