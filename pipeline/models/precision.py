"""In which arithmetic a model computes, and what of a forward pass is kept for the backward pass.

Weights, gradients and moments stay float32: they are the master weights, and what is written. Under bfloat16 the layers
multiply in half precision (torch's autocast); sums, norms, the heads and the softmax over the vocabulary do not.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from pipeline.products import wide_products

Dtype = Literal["float32", "bfloat16"]


def computing(model: Any, dtype: Dtype, recompute: bool = False) -> Any:
    """The model, told in which arithmetic its layers compute, and whether their inputs alone are kept for training.

    Recomputing costs a forward pass more, and leaves of a layer's activations one hidden state per token (Chen et al.,
    arXiv:1604.06174). It changes no gradient.
    """
    model.compute_dtype = dtype
    if recompute:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": _twice_the_same}
        )
    return model


def _twice_the_same() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """How a layer computes in the forward pass, and again in the backward pass."""
    return wide_products(), wide_products()


def arithmetic(model: Any) -> AbstractContextManager[Any]:
    """That of the model's layers."""
    if getattr(model, "compute_dtype", "float32") == "float32":
        return nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)
