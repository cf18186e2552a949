"""What is asked of low-rank adapters: a module that a command line can read without torch."""

from pydantic import Field

from pipeline.settings import Settings


class Lora(Settings):
    """Adapters that are trained in place of a model's weights: W' = W + alpha / rank * B A (arXiv:2106.09685)."""

    rank: int = Field(16, ge=1)
    """Columns of B and rows of A."""
    alpha: int = Field(32, ge=1)
    """Their product is multiplied by this over the rank."""
