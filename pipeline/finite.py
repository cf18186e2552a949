"""Whether numbers are finite."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

FEW = 2**20
"""So many are looked through by one thread: several would wait for each other, where another process computes too."""


def all_finite(numbers: Float[Tensor, "*any"]) -> bool:
    """Whether none of them is infinite or NaN: the least and the largest tell, in a tenth of `isfinite`'s time."""
    if not numbers.numel():
        return True
    numbers = numbers.detach()
    if numbers.device.type == "cpu" and numbers.dtype == torch.float32 and numbers.numel() < FEW:
        array = numbers.numpy()
        return bool(np.isfinite(array.min()) and np.isfinite(array.max()))
    least, largest = torch.aminmax(numbers)
    return bool(torch.isfinite(least) & torch.isfinite(largest))
