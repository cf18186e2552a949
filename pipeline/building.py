"""Hugging Face models from checkpoints. Where one like it was built before, only the tensors are read.

transformers takes 15 to 20 ms to build a model that trains for a second; iterations have the same one again and again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging

from pipeline.attention import attend_by_products
from pipeline.errors import ArtifactError
from pipeline.tensors import Tensors, copying
from pipeline.twins import twin

DESCRIPTIONS = ("config.json", "generation_config.json")

ALIGNED = 64
"""Bytes: torch's own tensors begin at multiples of it."""


def built(loader: Any, checkpoint: Path, dtype: Any, config: Any = None) -> tuple[Any, set[str]]:
    """A model in evaluation mode on the CPU, and the names of its tensors that the files do not have.

    `loader` is one of transformers' Auto classes, `dtype` torch's or `auto`; with `config` the model is of that one and
    not of the checkpoint's. It attends as `pipeline/attention.py` does.
    Raises what transformers raises: `OSError`, `ValueError`, `RuntimeError` or `SafetensorError`.
    """
    alike = _alike(checkpoint) if config is None else None
    if alike is not None and (loader, dtype, alike) in _templates:
        return _filled(_templates[loader, dtype, alike], checkpoint), set()
    given = {} if config is None else {"config": config}
    with no_progress_bar():
        model, loading = loader.from_pretrained(
            checkpoint, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False, **given
        )
    attend_by_products(model)
    if not torch.cuda.is_available():
        _align(model)
    missing = set(loading["missing_keys"])
    if alike is not None and not missing and _holds(model, checkpoint):
        _made_of[model] = _templates[loader, dtype, alike] = _emptied(model)
    return model, missing


def refilled(model: Any, loader: Any, checkpoint: Path, dtype: Any) -> bool:
    """Give a model the weights of a checkpoint, where it lies, if `built` would make one that differs in them alone.

    Returns whether it would. Raises what `built` raises; the model is of no use then.
    """
    alike = _alike(checkpoint)
    if alike is None or model not in _made_of or _made_of[model] is not _templates.get((loader, dtype, alike)):
        return False
    own = model.state_dict()
    with Tensors(checkpoint) as tensors, copying(of.shape for of in own.values()):
        for name in tensors.names():
            own[name].copy_(tensors.whole(name))
    model.config._name_or_path = str(checkpoint)  # as from_pretrained has it
    return True


_templates: dict[tuple[Any, ...], Any] = {}
"""Models without weights, by what their checkpoints have in common."""
_made_of: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Model -> the one without weights that it is a copy of."""


def _alike(checkpoint: Path) -> tuple[Any, ...] | None:
    """What checkpoints have in common that differ in their weights alone; None where weights lie in other files."""
    try:
        with Tensors(checkpoint) as tensors:
            shapes = tuple((name, tensors.shape(name), tensors.dtype(name)) for name in tensors.names())
    except (ArtifactError, SafetensorError):
        return None
    files = (checkpoint / name for name in DESCRIPTIONS)
    return (shapes, *(file.read_bytes() if file.exists() else None for file in files))


def _holds(model: Any, checkpoint: Path) -> bool:
    """Whether the model's tensors are those in the files: of some families transformers makes others of them."""
    own = model.state_dict(keep_vars=True)
    with Tensors(checkpoint) as tensors:
        named = {id(own[name]) for name in tensors.names() if name in own}
        return named == {id(of) for of in own.values()} and all(
            name in own and own[name].equal(tensors.whole(name).to(own[name].dtype)) for name in tensors.names()
        )


def _align(model: Any) -> None:
    """Have all tensors begin where a register's worth of numbers does, wherever they stand in a mapped file.

    MKL adds up in another order elsewhere: the last digits would tell the first model of a process from the next.
    """
    for of in model.state_dict(keep_vars=True).values():
        if of.data_ptr() % ALIGNED:
            of.data = of.data.clone()


def _emptied(model: Any) -> Any:
    """A copy with tensors that have shapes and no numbers; but for those that no file has."""
    own = model.state_dict(keep_vars=True).values()
    return twin(model, {id(of): _as_is(of, of.detach().to("meta")) for of in own})


def _filled(template: Any, checkpoint: Path) -> Any:
    """A copy with the tensors of a checkpoint."""
    own, found = template.state_dict(keep_vars=True), {}
    with Tensors(checkpoint) as tensors, copying(of.shape for of in own.values()):
        for name in tensors.names():
            of = own[name]
            found[id(of)] = _as_is(of, tensors.whole(name).to(of.dtype, copy=True))
    model = twin(template, found)
    model.config._name_or_path = str(checkpoint)  # as from_pretrained has it
    _made_of[model] = template
    return model


def _as_is(of: Tensor, numbers: Tensor) -> Tensor:
    return nn.Parameter(numbers, of.requires_grad) if isinstance(of, nn.Parameter) else numbers


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Have transformers show none."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
