"""A training in progress, saved every so many optimizer steps: after a crash it goes on from there, bit for bit.

    working/progress/00000200-HASH16/    the last saving; the one before it is deleted once this one is on the disk
        state.json                       rows of the metrics so far, what is no tensor, hashes of the tensors
        rank-0-of-1.safetensors          weights, moments of the optimizer, what a watcher remembers: each rank's share

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

from pipeline.artifacts import Outbox, file_record
from pipeline.disk import flush
from pipeline.errors import ArtifactError
from pipeline.models.distributed import everybody, like, own, released, told
from pipeline.ranks import count, rank

UNREADABLE = (OSError, ValueError, LookupError, TypeError, SafetensorError)
"""What reading damaged JSON or tensors raises."""

_STATE, _UNFINISHED = "state.json", "unfinished"


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
    """What of a module a training may change: parameters that it trains, and buffers; what is tied, once."""

    module: nn.Module

    def state(self) -> State:
        """By the module's names."""
        released(self.module)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}  # some share their memory
        return State({**self._trained(), **buffers}, {})

    def resume(self, state: State) -> None:
        """Copy them back."""
        released(self.module)
        mine = {**self._trained(), **dict(self.module.named_buffers())}
        if unpaired := sorted(mine.keys() ^ state.tensors.keys()):
            raise ValueError(f"only one of model and file has {', '.join(unpaired[:5])}")
        with torch.no_grad():
            for name, value in mine.items():
                try:
                    found = like(state.tensors[name], value)
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from error
                own(value).copy_(own(found))

    def _trained(self) -> dict[str, Tensor]:
        return {name: weights for name, weights in self.module.named_parameters() if weights.requires_grad}


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
            step, why = int(folder.name.partition("-")[0]), ""
            try:
                rows, states = _read(folder)
            except UNREADABLE as error:
                why = str(error)
            if reasons := list(filter(None, everybody(why))):
                self.out.say(f"not going on from step {step}, what was saved there is of no use: {reasons[0]}")
                if not rank():
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
        if not rank():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        told("the folder is there")
        hashed = _write(unfinished, self.out.metrics.rows, {name: part.state() for name, part in parts.items()})
        if rank():
            return
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
    """Have it all on the disk and return the hash of `state.json`, on rank 0."""
    named = {f"{part}/{name}": own(tensor) for part, state in states.items() for name, tensor in state.tensors.items()}
    write_tensors(folder / _share(), named)
    flush(folder / _share())
    written = everybody((_share(), file_record(folder / _share()).blake2b))
    if rank():
        return ""
    values = {part: state.values for part, state in states.items()}
    (folder / _STATE).write_text(json.dumps({"rows": rows, "values": values, "tensors": dict(written)}), "utf-8")
    for path in (folder / _STATE, folder):
        flush(path)
    return file_record(folder / _STATE).blake2b


def _share() -> str:
    """The file with what this process has of the tensors."""
    return f"rank-{rank()}-of-{count()}.safetensors"


def _read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, State]]:
    """The rows of the metrics and the state of every part. Raises one of `UNREADABLE` unless it is as written."""
    _check(folder / _STATE, folder.name.partition("-")[2])
    kept = json.loads((folder / _STATE).read_bytes())
    if _share() not in kept["tensors"]:
        raise ValueError(f"it was saved by {len(kept['tensors'])} processes, and these are {count()}")
    _check(folder / _share(), kept["tensors"][_share()])
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in kept["values"]}
    for name, tensor in load_file(folder / _share()).items():
        part, _, theirs = name.partition("/")
        tensors[part][theirs] = tensor
    return kept["rows"], {part: State(tensors[part], values) for part, values in kept["values"].items()}


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
