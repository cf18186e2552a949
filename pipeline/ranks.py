"""Which of how many processes this is, as torchrun tells each that it starts."""

import os

STARTED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Environment variable: without it, `WORLD_SIZE` is somebody else's."""


def count() -> int:
    """Processes that work on the same stage."""
    return int(os.environ["WORLD_SIZE"]) if STARTED_BY_TORCHRUN in os.environ else 1


def rank() -> int:
    """Number of this process among them, from 0; rank 0 alone writes."""
    return int(os.environ["RANK"]) if STARTED_BY_TORCHRUN in os.environ else 0
