"""What a run will take, before it is started; and beside it what was measured, where it has been."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from flows.sheets import Sheet
from pipeline.algorithms.bind import bind
from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.estimate import DEVICES, Place, Sampler, Shape, Step, Training, Work, hosted, iteration, shards
from pipeline.experiment import Experiment
from pipeline.models.lora import Lora
from pipeline.storage import MANIFEST

CHARACTERS = 64
"""Tokens of a tokenizer that is still to be made of a text's characters."""
LITTLE = 0.98
"""Share of what a stage holds above which a change of it is no advice."""
LONG = 0.1
"""Share of an iteration above which moving checkpoints is told as what breaks first."""
ADAPTED = 16
"""Rank of the adapters that are advised."""
SHARDED = frozenset({"rollout", "label", "score"})
"""Stages that Ray's workers do, on machines that this one may not be."""
TRAINS = {"update": "policy", "value": "critic"}
"""Stage -> what it trains."""


@dataclass(frozen=True)
class Plan:
    """What an estimate is made for."""

    shape: Shape
    work: Work
    name: str
    """Of the devices."""
    place: Place
    training: Training
    sampler: Sampler
    averaged: bool
    """The policy's weights are averaged over updates: adapters are no way out."""
    measured: Mapping[str, tuple[float, float]]
    """Stage -> bytes and seconds of the last iteration that was run."""

    @cached_property
    def steps(self) -> Mapping[str, Step]:
        """Stage -> what it takes."""
        return iteration(self.shape, self.work, self.place, self.training, self.sampler)

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        return sum(step.seconds + step.start for step in self.steps.values())

    def room(self, stage: str) -> float:
        """Bytes of a device that a stage may take."""
        return self.place.device.memory * (self.sampler.filled if stage == "rollout" else 1.0)


def plan(experiment: Experiment, folder: Path, device: str, count: int, length: float | None) -> Plan:
    """Reckon an iteration on `count` devices; `length` is the mean length of responses, the longest when absent.

    Raises `ExperimentError` for an unknown device, for fewer devices than an engine takes, for a mean above the longest
    and for a mixture of experts; `ArtifactError` for a model whose config does not tell its shape.
    """
    if device not in DEVICES:
        raise ExperimentError(f"--device is {device!r}", do=f"one of {', '.join(DEVICES)}")
    least, longest = experiment.resources.tensor_parallel, experiment.scale.response_tokens
    if count < least:
        raise ExperimentError(
            f"--count is {count}, and an engine takes resources.tensor_parallel = {least}", do=f"{least} or more"
        )
    if length is not None and not 0 < length <= longest:
        raise ExperimentError(
            f"--length is {length:g}: the mean length of responses of at most scale.response_tokens = {longest}",
            do=f"above 0, at most {longest}; or --set scale.response_tokens=...",
        )
    resources = experiment.resources
    place = Place.of(DEVICES[device], count, resources.launcher, resources.launchers)
    return replace(_plan(experiment, f"{count} x {device}", place, length), measured=_measured(folder))


def _plan(experiment: Experiment, name: str, place: Place, length: float | None = None) -> Plan:
    recipe, scale, resources = experiment.recipe, experiment.scale, experiment.resources
    shape, group = _shape(experiment), recipe.rollout.group_size
    work = Work(
        responses=scale.groups * group, group=group, prompt_tokens=scale.prompt_tokens,
        response_tokens=length or scale.response_tokens, longest=scale.response_tokens, needs=len(bind(recipe).needs),
        epochs=recipe.update.epochs, minibatches=recipe.update.minibatches,
        critic=None if recipe.critic is None else _critic(experiment, shape),
    )  # fmt: skip
    training = Training(
        resources.micro_batch_tokens, resources.compute_dtype == "bfloat16", resources.recompute,
        _rank(experiment.scale.lora), _rank(experiment.critic.lora), resources.offload,
    )  # fmt: skip
    sampler = Sampler(
        4 if resources.dtype == "float32" else 2, resources.tensor_parallel, resources.max_num_seqs,
        resources.gpu_memory_utilization,
    )  # fmt: skip
    return Plan(shape, work, name, place, training, sampler, recipe.update.ema is not None, {})


def _rank(lora: Lora | None) -> int | None:
    return None if lora is None else lora.rank


def _shape(experiment: Experiment) -> Shape:
    if experiment.models.policy is None:
        return _new(experiment.models.new)
    return _told(Path(experiment.models.policy), "policy")


def _critic(experiment: Experiment, policy: Shape) -> Shape:
    """Of the critic: its own where one is named, the policy's otherwise; without a head that has a row per token."""
    named = experiment.models.critic
    return replace(policy if named is None else _told(Path(named), "critic"), tied=True)


def _told(model: Path, which: str) -> Shape:
    path = model / "config.json"
    try:
        return Shape.of(json.loads(path.read_bytes()))
    except OSError as error:
        raise ArtifactError(f"cannot read the config of the {which}", str(path), f"check models.{which}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the config does not tell the shape of a llama-like model: {error}", str(path), f"name another {which}"
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
    """Stage -> bytes and seconds in the last whole iteration that a run has made; without the starts of processes."""
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
    header = ["stage", "bytes at most", "seconds", "start-up", "memory of a device"]
    header += ["measured: bytes", "seconds"] if made.measured else []
    rows = []
    for name, step in made.steps.items():
        row = [name, amount(step.written), f"{step.seconds:,.1f}", f"{step.start:,.1f}"]
        row.append(amount(step.memory) if step.memory else "")
        if made.measured:
            size, seconds = made.measured.get(name, (0.0, 0.0))
            row += [amount(size), f"{seconds:,.1f}"]
        rows.append(row)
    others = "".join(f", of {stage} {launcher}" for stage, launcher in made.place.launchers.items())
    title = f"an iteration of {experiment.recipe.name} on {made.name}, launcher {made.place.launcher}{others}"
    return [
        Sheet(title, tuple(header), tuple(map(tuple, rows))),
        Sheet("in all", ("", ""), tuple(_whole(made, experiment))),
    ]


def _whole(made: Plan, experiment: Experiment) -> list[tuple[str, str]]:
    tables = sum(step.written for name, step in made.steps.items() if name not in TRAINS)
    checkpoints = sum(step.written for name, step in made.steps.items() if name in TRAINS)
    starting, total = sum(step.start for step in made.steps.values()), experiment.scale.iterations
    moving = sum(step.moved for step in made.steps.values()) / made.place.device.storage / made.seconds
    place, (number, size) = made.place, shards(made.work, made.sampler, made.place.by("rollout"))
    return [
        ("parameters", f"{made.shape.parameters:,}"),
        ("tokens of an iteration's responses", f"{made.work.tokens:,.0f}"),
        ("tables of an iteration", amount(tables)),
        ("checkpoints of an iteration, written", amount(checkpoints)),
        (f"{total} iterations, nothing pruned", amount(total * (tables + checkpoints))),
        ("engines, and times they are asked", f"{place.engines(made.sampler)}, {number} x {size} responses"),
        ("devices that read; that train", f"{place.readers(made.work)}; {place.ranks('update')}"),
        ("seconds of an iteration", f"{made.seconds:,.0f}"),
        ("of these, starting processes and reading models", f"{starting:,.0f} ({starting / made.seconds:.0%})"),
        ("of these, moving checkpoints", f"{moving:.0%}"),
        ("what breaks first", breaks(made, moving)),
    ]


def breaks(made: Plan, moving: float) -> str:
    """What stands in the way, and at what size it would not."""
    if stage := too_large(made):
        return _wanting(made, stage)
    engines, (number, _) = made.place.engines(made.sampler), shards(made.work, made.sampler, made.place.by("rollout"))
    if number < engines:
        each = -(-made.work.responses // engines)
        return f"work for {engines} engines: it is cut {number} times; resources.max_num_seqs={each}"
    if moving > LONG:
        storage = amount(made.place.device.storage)
        return f"checkpoints as files: {moving:.0%} of an iteration; storage above {storage}/s"
    return "nothing: it fits"


def too_large(made: Plan, elsewhere: frozenset[str] = frozenset()) -> str | None:
    """The stage that lacks most memory on a device; None where all fit but those that are done `elsewhere`."""
    lacking = {name: step.memory - made.room(name) for name, step in made.steps.items() if name not in elsewhere}
    most = max(lacking, key=lambda name: lacking[name])
    return most if lacking[most] > 0 else None


def _wanting(made: Plan, stage: str) -> str:
    """What a stage needs of a device, what for, and what can be done about it."""
    what = f"memory of {stage}: {amount(made.steps[stage].memory)} of a device, {_parts(made, stage)}; "
    return f"{what}there are {amount(made.room(stage))}; {_advice(made, stage)}"


def _parts(made: Plan, stage: str) -> str:
    shape = made.work.critic if stage == "value" else made.shape
    assert shape is not None  # noqa: S101  # for the type checker: without a critic there is no such stage
    if stage not in TRAINS:
        return f"for {shape.parameters:,} parameters" + " and a response's keys and values" * (stage == "rollout")
    activations = made.training.activations(shape, made.training.at_once(made.work))
    held = "weights and gradients" if made.training.offload else "weights, gradients and moments"
    return (
        f"{amount(made.steps[stage].memory - activations)} for {held} of {shape.parameters:,} parameters, "
        f"{amount(activations)} for activations"
    )


def _advice(made: Plan, stage: str) -> str:
    """The changes that leave a stage less to hold, each with what it would hold then."""
    now = made.steps[stage].memory
    changes = [(words, then.steps[stage].memory) for words, then in _changes(made, stage)]
    told = [f"{words} ({amount(then)})" for words, then in changes if then < LITTLE * now]
    return ", ".join([*told, "or a smaller model"]) if told else "take a smaller model"


def _changes(made: Plan, stage: str) -> Iterator[tuple[str, Plan]]:
    if stage == "rollout":
        yield "resources.dtype=bfloat16", replace(made, sampler=replace(made.sampler, weight=2))
        for devices in (2, 4, 8):
            shared = replace(made, sampler=replace(made.sampler, devices=devices))
            if devices > made.sampler.devices and shared.steps[stage].memory <= made.room(stage):
                yield f"resources.tensor_parallel={devices}", shared
                break
        return
    if stage in TRAINS:
        for words, training in _trainings(made, stage):
            yield words, replace(made, training=training)
    yield from _more_devices(made, stage)


def _trainings(made: Plan, stage: str) -> Iterator[tuple[str, Training]]:
    training, row = made.training, int(made.work.row)
    yield "resources.recompute=true", replace(training, recompute=True)
    yield f"resources.micro_batch_tokens={row}", replace(training, micro_batch=row)
    if not made.place.device.core:
        yield "resources.offload=true", replace(training, offload=True)
    if stage == "value":
        yield f"critic.lora={{rank={ADAPTED}}}", replace(training, critic_rank=ADAPTED)
    elif not made.averaged:
        yield f"scale.lora={{rank={ADAPTED}}}", replace(training, rank=ADAPTED)


def _more_devices(made: Plan, stage: str) -> Iterator[tuple[str, Plan]]:
    """Sharing it: among the devices that are there, or the least power of two of them on which it fits."""
    if made.place.device.core:
        return
    for count in (made.place.count, *(2**power for power in range(1, 13))):
        launchers = {**made.place.launchers, stage: "torchrun"}
        shared = replace(made, place=replace(made.place, count=count, launchers=launchers))
        if count >= made.place.count and shared.steps[stage].memory <= made.room(stage):
            yield f"resources.launchers.{stage}=torchrun on {count} devices", shared
            return


def amount(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


@dataclass(frozen=True)
class Room:
    """Memory of a machine."""

    device: float
    """Bytes of an accelerator, of the smallest; of the machine itself where it has none."""
    cards: int
    """Accelerators."""
    host: float
    """Bytes of the machine itself."""


def here() -> Room:
    """This machine's memory."""
    import torch

    host = float(psutil.virtual_memory().total)
    cards = [torch.cuda.get_device_properties(card).total_memory for card in range(torch.cuda.device_count())]
    return Room(float(min(cards, default=host)), len(cards), host)


def refuse_what_cannot_fit(experiment: Experiment, room: Room) -> str:
    """Raise `ExperimentError` where a stage cannot fit into a device, or moments that are offloaded into the host.

    What is compared are lower bounds, of the devices that the launcher gives a stage; micro-batches count as full as
    they may be. Returns a line about what each stage holds, or why that is not told: a model's config does not say.
    """
    try:
        made = _plan(experiment, "this machine", _machine(experiment, room))
    except (ArtifactError, ExperimentError) as error:
        return f"  memory is not reckoned: {error.what}"
    resources = experiment.resources
    elsewhere = {stage for stage in SHARDED if resources.ray.address and made.place.by(stage) == "ray"}
    if stage := too_large(made, frozenset(elsewhere)):
        raise ExperimentError(
            f"{stage} needs {amount(made.steps[stage].memory)} of a device, {_parts(made, stage)}, and there are "
            f"{amount(made.room(stage))}", "models", f"any of these leaves it less: {_advice(made, stage)}",
        )  # fmt: skip
    _refuse_what_the_host_cannot_hold(made, room)
    held = ", ".join(f"{name} {amount(step.memory)}" for name, step in made.steps.items() if step.memory)
    return f"  of a device's {amount(room.device)} of memory, reckoned: {held}"


def _machine(experiment: Experiment, room: Room) -> Place:
    """This machine's devices, and under torchrun those of as many machines as it is told of."""
    kind = replace(DEVICES["h100" if room.cards else "core"], memory=room.device)
    resources = experiment.resources
    sharing = "torchrun" in (resources.launcher, *resources.launchers.values())
    count = _processes(resources.torchrun, room.cards) if sharing else room.cards
    return Place(kind, max(1, count) if room.cards else 1, resources.launcher, resources.launchers)


def _processes(words: tuple[str, ...], cards: int) -> int:
    """How many torchrun is told to start, on all nodes; `auto` and `gpu` are one for each accelerator of this one."""
    options = dict(_options(words))
    each, nodes = options.get("nproc-per-node", "1"), options.get("nnodes", "1").rpartition(":")[2]
    return (int(each) if each.isdigit() else cards) * (int(nodes) if nodes.isdigit() else 1)


def _options(words: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Options of a command line by name: `--name=value`, or `--name value`."""
    for word, after in zip(words, (*words[1:], ""), strict=True):
        name, given, value = word.lstrip("-").partition("=")
        if word.startswith("-"):
            yield name.replace("_", "-"), value if given else after


def _refuse_what_the_host_cannot_hold(made: Plan, room: Room) -> None:
    """Raise `ExperimentError` where moments are to lie in the host's memory, and that is too small for them."""
    if not made.training.offload:
        return
    models = {"update": (made.shape, made.training.rank), "value": (made.work.critic, made.training.critic_rank)}
    for stage, (shape, rank) in models.items():
        if shape is None:
            continue
        # Without accelerators the device's share lies in the same memory; ranks of other machines use theirs.
        local = min(1.0, room.cards / made.place.ranks(stage)) if room.cards else 1.0
        needed = local * hosted(shape, rank) + (0 if room.cards else made.steps[stage].memory)
        if needed > room.host:
            adapters = "critic.lora" if stage == "value" else "scale.lora"
            raise ExperimentError(
                f"{stage} needs {amount(needed)} of the host's memory for moments and copies of {shape.parameters:,} "
                f"parameters, and there are {amount(room.host)}", "resources.offload",
                f"resources.offload=false, {adapters}={{rank={ADAPTED}}}, or a smaller model",
            )  # fmt: skip
