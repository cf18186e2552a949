"""Low-rank adapters (LoRA) in the layers of a model: little is trained, and what is written is whole weights.

    W' = W + alpha / r * B A        A: [r, in], drawn; B: [out, r], zero      (Hu et al., arXiv:2106.09685, section 4.1)

W stays as it is, and has neither gradient nor moments. peft puts the adapters into every linear layer of the blocks; a
new head is trained as a whole beside them. A checkpoint has W', so that engines and whoever reads it need not know of
adapters. A training that goes on from a checkpoint finds A and B in its `trainer/` folder, in peft's format, and takes
them off W' again.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ArtifactError, ExperimentError
from pipeline.models.distributed import gathered
from pipeline.models.lora import Lora
from pipeline.ranks import rank

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""peft's names: its `PeftModel.from_pretrained` reads a folder that has them."""

_NAME = "default"
_PREFIX = "base_model.model."
_HEAD = "score"
"""Of reward models and critics, as `checkpoint` has it."""


def attached(model: Any, lora: Lora | None, seed: int, before: Path | None = None) -> Any:
    """The model with adapters, as it is where none are asked for; only they and a head `score` are trained.

    A is drawn by `seed`, and B is 0: nothing changes yet. Where the folder `before` has a training's adapters, these
    are taken off the weights and go on. Raises `ArtifactError` where that was trained otherwise, and `ExperimentError`
    for a model without linear layers in its blocks.
    """
    _refuse_other(lora, before)
    if lora is None:
        return model
    from peft import LoraConfig, inject_adapter_in_model  # seconds to import, and few ask for it

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=_linear_layers(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _NAME)
    head = getattr(model, _HEAD, None)
    if isinstance(head, nn.Module):
        head.requires_grad_(True)
    if before is not None and (before / TENSORS).exists():
        _take_off(model, before / TENSORS)
    return model


def merged(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors of `tensors`, all of the model's: W' in place of W, B and A."""
    whole = dict(tensors)
    for name, layer in _layers(model):
        b, a = (whole.pop(f"{name}.lora_{side}.{_NAME}.weight") for side in "BA")
        for kind in ("weight", "bias"):
            if (kept := whole.pop(f"{name}.base_layer.{kind}", None)) is not None:
                whole[f"{name}.{kind}"] = kept
        whole[f"{name}.weight"] = whole[f"{name}.weight"] + layer.scaling[_NAME] * (b @ a)
    return whole


def adapts(model: Any) -> bool:
    """Whether the model has adapters."""
    return hasattr(model, "peft_config")


def save(model: Any, folder: Path) -> None:
    """Write the adapters, if there are any, as peft reads them: `PeftModel.from_pretrained(BASE, folder)`."""
    tensors = gathered({
        f"{_PREFIX}{name}.lora_{side}.weight": getattr(layer, f"lora_{side}")[_NAME].weight
        for name, layer in _layers(model)
        for side in "AB"
    })  # fmt: skip
    if rank() or not adapts(model):
        return
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    told = model.peft_config[_NAME].to_dict()
    # A set has another order in every process, and the same adapters are to have the same bytes.
    sorted_sets = {name: sorted(value) if isinstance(value, set) else value for name, value in told.items()}
    (folder / CONFIG).write_text(json.dumps(sorted_sets, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and modules that have adapters."""
    if not adapts(model):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _linear_layers(model: Any) -> list[str]:
    """What the linear layers in the model's blocks are called."""
    blocks = set(model._no_split_modules or ())  # transformers has no public name for them
    kinds = {
        name.rpartition(".")[2]
        for block in model.modules()
        if type(block).__name__ in blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not kinds:
        raise ExperimentError(
            f"a {type(model).__name__} has no linear layers to put adapters into",
            do="take `lora` out, or another family of models, such as qwen3 or llama",
        )
    return sorted(kinds)


def _refuse_other(lora: Lora | None, before: Path | None) -> None:
    """Raise where a training would go on with moments of other parameters than it has."""
    if before is None or not before.is_dir():
        return
    found = before / CONFIG
    try:
        told = json.loads(found.read_bytes()) if found.exists() else None
        was = None if told is None else Lora(rank=told["r"], alpha=told["lora_alpha"])
    except (ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"unusable adapters: {error}", str(found), "delete the artifact and re-run") from error
    if was != lora:
        raise ArtifactError(
            f"it was trained {_said(was)}, and is to go on {_said(lora)}", str(before),
            "ask for the same `lora` as before; or give the run another --name, to start from its first iteration",
        )  # fmt: skip


def _said(lora: Lora | None) -> str:
    return "without adapters" if lora is None else f"with adapters of rank {lora.rank} and alpha {lora.alpha}"


@torch.no_grad()
def _take_off(model: Any, path: Path) -> None:
    """Have the adapters of `path`, and the weights that they were trained beside."""
    try:
        found = load_file(path)
        for name, layer in _layers(model):
            for side in "AB":
                getattr(layer, f"lora_{side}")[_NAME].weight.copy_(found.pop(f"{_PREFIX}{name}.lora_{side}.weight"))
            layer.base_layer.weight -= layer.get_delta_weight(_NAME)
    except (OSError, LookupError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"unusable adapters: {error}", str(path), "delete the artifact and re-run") from error
    if found:
        raise ArtifactError(
            f"adapters of layers that this model has not: {', '.join(sorted(found)[:3])}", str(path),
            "delete the artifact and re-run",
        )  # fmt: skip
