"""Where tensors live."""

import torch


def device() -> torch.device:
    """The accelerator of this process if it has one, the processor otherwise."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
