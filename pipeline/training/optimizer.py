"""AdamW, learning-rate schedules, and the state that a checkpoint carries in its `trainer/` folder."""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import ArtifactError
from pipeline.models.distributed import gathered, like, on_host, own
from pipeline.ranks import rank
from pipeline.tensors import copying
from pipeline.training.progress import UNREADABLE, State, write_tensors

TRAINER = "trainer"
_STATE, _TENSORS = "state.json", "optimizer.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")

BETAS = (0.9, 0.95)
"""InstructGPT's (arXiv:2203.02155, appendix C); the other papers name none."""

Schedule = Callable[[int], float]
"""Optimizer step (from 0) -> share of the peak learning rate."""


def adamw(model: nn.Module, learning_rate: float, weight_decay: float, *, offload: bool = False) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101); norms and biases (one dimension) do not decay.

    With `offload` its moments stay in the host's memory, and it steps there: weights and gradients travel at each step.
    On several processes each does so with its share.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    stepped = [on_host(p) for p in trained] if offload else trained
    decaying, others = ([p for p in stepped if (p.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS)
    if offload:
        pairs = list(zip(trained, stepped, strict=True))
        optimizer.register_step_pre_hook(lambda *_: _fetch(pairs))
        optimizer.register_step_post_hook(lambda *_: _bring(pairs))
    return optimizer


@torch.no_grad()
def _fetch(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Have the device's weights and gradients in the host's copies."""
    for weights, host in pairs:
        own(host).copy_(own(weights))
        host.grad = None if weights.grad is None else like(own(weights.grad).to("cpu", copy=True), host)


@torch.no_grad()
def _bring(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Give the device the weights that were stepped."""
    for weights, host in pairs:
        own(weights).copy_(own(host))
        weights.grad = host.grad = None


def constant(warmup: int) -> Schedule:
    """Linear warm-up over `warmup` steps, constant after that."""
    return lambda step: min(1.0, (step + 1) / (warmup + 1))


def cosine(warmup: int, total: int, final_share: float) -> Schedule:
    """Linear warm-up over `warmup` steps, then half a cosine down to `final_share` of the peak at step `total`."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))

    return share


@dataclass(frozen=True)
class Moments:
    """What AdamW remembers of every parameter. Its learning rate and weight decay are settings, and no part of that."""

    optimizer: torch.optim.Optimizer

    def state(self) -> State:
        """Tensors by number of the parameter and name (`0.exp_avg`); parameters per group."""
        known = self.optimizer.state_dict()["state"]
        tensors = {f"{number}.{name}": value for number, of in known.items() for name, value in of.items()}
        return State(tensors, {"groups": self._sizes()})

    def resume(self, state: State) -> None:
        """Remember that instead. Raises `ValueError`, and changes nothing, where it is of other parameters."""
        if (sizes := state.values.get("groups")) != self._sizes():
            raise ValueError(f"made for groups of {sizes} parameters, this model has {self._sizes()}")
        known: dict[int, dict[str, Tensor]] = defaultdict(dict)
        with copying(of.shape for of in state.tensors.values()):
            for key, value in state.tensors.items():
                number, _, name = key.partition(".")
                known[int(number)][name] = value.clone()  # not a view of a file that may be deleted
        groups = self.optimizer.param_groups
        weights = dict(enumerate(parameter for group in groups for parameter in group["params"]))
        for place, of in known.items():
            found = {name: list(value.shape) for name, value in of.items()}
            wanted = _shapes(weights[place])
            if found not in (wanted, _shapes(own(weights[place]))):
                raise ValueError(f"parameter {place} has {found}, not {wanted}")
            of |= {name: like(of[name], weights[place]) for name in _MOMENTS}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(known)})

    def _sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.optimizer.param_groups]


def _shapes(weights: Tensor) -> dict[str, list[int]]:
    """Of what AdamW remembers of a parameter."""
    return {"step": [], **{name: list(weights.shape) for name in _MOMENTS}}


def save_state(optimizer: torch.optim.Optimizer, step: int, checkpoint: Path) -> None:
    """Write optimizer state and step count into the checkpoint's `trainer/` folder."""
    tensors, values = Moments(optimizer).state()
    tensors = gathered(tensors)
    if rank():
        return
    folder = checkpoint / TRAINER
    folder.mkdir(exist_ok=True)
    write_tensors(folder / _TENSORS, tensors)
    (folder / _STATE).write_text(json.dumps({"step": step, **values}) + "\n", encoding="utf-8")


def load_state(optimizer: torch.optim.Optimizer, checkpoint: Path) -> int:
    """Restore optimizer state from `checkpoint` and return the number of steps taken; 0 where there is none.

    The learning rate and weight decay stay those of `optimizer`. Raises `ArtifactError` when the state does not fit.
    """
    path = checkpoint / TRAINER
    if not path.exists():
        return 0
    try:
        path = checkpoint / TRAINER / _STATE
        step, values = _told(path)
        path = checkpoint / TRAINER / _TENSORS
        Moments(optimizer).resume(State(load_file(path), values))
    except UNREADABLE as error:
        raise ArtifactError(
            f"unusable optimizer state: {error}", str(path), "delete the artifact and re-run"
        ) from error
    return step


def _told(path: Path) -> tuple[int, dict[str, Any]]:
    told = json.loads(path.read_bytes())
    if not isinstance(told, dict) or type(told.get("step")) is not int:
        raise ValueError("it does not say after how many steps")
    return told["step"], told
