"""A training in progress, saved every so many optimizer steps: after a crash it goes on from there, bit for bit.

    working/progress/00000200-HASH16/    the last saving; the one before it is deleted once this one is on the disk
        state.json                       rows of the metrics so far, what is no tensor, hash of the tensors
        tensors.safetensors              weights, moments of the optimizer, what a watcher remembers

The directory's name has the hash of `state.json`, so no byte of a saving can change unseen. Random numbers are not
kept: those of a step (dropout) are a function of the seed and of the steps taken before it.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.artifacts import Outbox, file_record, flush
from pipeline.errors import ArtifactError

UNREADABLE = (OSError, ValueError, LookupError, TypeError, SafetensorError)
"""What reading damaged JSON or tensors raises."""

_STATE, _TENSORS, _UNFINISHED = "state.json", "tensors.safetensors", "unfinished"


class State(NamedTuple):
    """What something remembers from step to step."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    """All that is no tensor, as JSON has it."""


class Stateful(Protocol):
    """Something that has to be as it was when a training goes on."""

    def state(self) -> State:
        """All that changes from step to step."""
        ...

    def resume(self, state: State) -> None:
        """Be as `state` said. Raises `ValueError` for what does not fit."""
        ...


@dataclass(frozen=True)
class Weights:
    """Parameters and buffers of a module; what is tied, once."""

    module: nn.Module

    def state(self) -> State:
        """By the module's names."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}  # some share their memory
        return State({**dict(self.module.named_parameters()), **buffers}, {})

    def resume(self, state: State) -> None:
        """Copy them back."""
        own = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        if unpaired := sorted(own.keys() ^ state.tensors.keys()):
            raise ValueError(f"only one of model and file has {', '.join(unpaired[:5])}")
        with torch.no_grad():
            for name, value in own.items():
                found = state.tensors[name]
                if found.shape != value.shape:
                    raise ValueError(f"{name} of shape {list(found.shape)}, the model's is {list(value.shape)}")
                value.copy_(found)


@dataclass(frozen=True)
class Progress:
    """Saves a training in the working directory of its artifact, and lets it go on from there."""

    out: Outbox
    every: int
    """Optimizer steps between two savings; 0: none."""

    def resume(self, parts: Mapping[str, Stateful], total: int) -> int:
        """Put back what was saved last and return how many of `total` steps it had taken; 0 where there is nothing.

        A saving that is damaged is passed over, and the log says so.
        """
        for folder in self._savings():
            step = int(folder.name.partition("-")[0])
            try:
                rows, states = _read(folder)
            except UNREADABLE as error:
                self.out.say(f"not going on from step {step}, what was saved there is damaged: {error}")
                shutil.rmtree(folder)
                continue
            _put_back(parts, states, folder)
            self.out.metrics.rows[:] = rows
            self.out.say(f"going on from step {step} of {total}")
            return step
        return 0

    def after_step(self, step: int, parts: Mapping[str, Stateful]) -> None:
        """Save after step number `step` of this training, if it is time to."""
        if not self.every or step % self.every:
            return
        unfinished = self._place / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        hashed = _write(unfinished, self.out.metrics.rows, {name: part.state() for name, part in parts.items()})
        unfinished.rename(self._place / f"{step:08d}-{hashed[:16]}")
        flush(self._place)
        for older in self._savings()[1:]:
            shutil.rmtree(older)

    @property
    def _place(self) -> Path:
        return self.out.working / "progress"

    def _savings(self) -> list[Path]:
        """The latest first; more than one where a crash came between a saving and the clearing away after it."""
        return sorted(self._place.glob("[0-9]*-*"), reverse=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device; the same tensors, the same bytes."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write(folder: Path, rows: list[dict[str, Any]], states: Mapping[str, State]) -> str:
    """Have it all on the disk and return the hash of `state.json`."""
    named = {f"{part}/{name}": tensor for part, state in states.items() for name, tensor in state.tensors.items()}
    write_tensors(folder / _TENSORS, named)
    values = {part: state.values for part, state in states.items()}
    told = {"rows": rows, "values": values, "tensors": file_record(folder / _TENSORS).blake2b}
    (folder / _STATE).write_text(json.dumps(told), encoding="utf-8")
    for path in (folder / _TENSORS, folder / _STATE, folder):
        flush(path)
    return file_record(folder / _STATE).blake2b


def _read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, State]]:
    """The rows of the metrics and the state of every part. Raises one of `UNREADABLE` unless it is as written."""
    _check(folder / _STATE, folder.name.partition("-")[2])
    told = json.loads((folder / _STATE).read_bytes())
    _check(folder / _TENSORS, told["tensors"])
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in told["values"]}
    for name, tensor in load_file(folder / _TENSORS).items():
        part, _, own = name.partition("/")
        tensors[part][own] = tensor
    return told["rows"], {part: State(tensors[part], values) for part, values in told["values"].items()}


def _check(path: Path, hashed: str) -> None:
    if not file_record(path).blake2b.startswith(hashed):
        raise ValueError(f"{path.name} has other bytes than were written")


def _put_back(parts: Mapping[str, Stateful], states: Mapping[str, State], folder: Path) -> None:
    for name, part in parts.items():
        try:
            part.resume(states[name])
        except (ValueError, LookupError) as error:
            raise ArtifactError(
                f"another program saved this training: {name}: {error}", str(folder),
                "run again: it starts from the first step",
            ) from error  # fmt: skip
