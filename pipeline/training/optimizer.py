"""AdamW, learning-rate schedules, and the state that a checkpoint carries in its `trainer/` folder."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import ArtifactError

TRAINER = "trainer"
_STATE = "state.pt"

BETAS = (0.9, 0.95)
"""InstructGPT's (arXiv:2203.02155, appendix C); the other papers name none."""

Schedule = Callable[[int], float]
"""Optimizer step (from 0) -> share of the peak learning rate."""


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101); norms and biases (one dimension) do not decay."""
    decaying = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS)


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


def save_state(optimizer: torch.optim.Optimizer, step: int, checkpoint: Path) -> None:
    """Write optimizer state and step count into the checkpoint's `trainer/` folder."""
    folder = checkpoint / TRAINER
    folder.mkdir(exist_ok=True)
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, folder / _STATE)


def load_state(optimizer: torch.optim.Optimizer, checkpoint: Path) -> int:
    """Restore optimizer state from `checkpoint` and return the number of steps taken; 0 where there is none.

    The learning rate and weight decay stay those of `optimizer`. Raises `ArtifactError` when the state does not fit.
    """
    path = checkpoint / TRAINER / _STATE
    if not path.exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        wanted = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        _check_shapes(optimizer)
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ArtifactError(
            f"unusable optimizer state: {error}", str(path), "delete the artifact and re-run"
        ) from error
    for group, settings in zip(optimizer.param_groups, wanted, strict=True):
        group.update(settings)
    return int(state["step"])


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {list(value.shape)} for a parameter of {list(parameter.shape)}")
