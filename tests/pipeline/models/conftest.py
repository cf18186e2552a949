"""One small policy, on disk and in memory, for the tests of models."""

import pytest

from pipeline.models.checkpoint import save
from pipeline.models.fresh import ModelSpec, create

TEXTS = ["What is 12 + 30?", "It is 42.\n", "Ångström, naïve, 東京", "the quick brown fox jumps over the lazy dog"]


@pytest.fixture(scope="session")
def texts():
    return TEXTS


@pytest.fixture(scope="session")
def policy():
    """(model, tokenizer): two layers, 64 wide, untied, with weights wide enough for opinions."""
    spec = ModelSpec(layers=2, width=64, heads=2, kv_heads=1, max_position=128, init_std=0.2)
    return create(spec, TEXTS, seed=3)


@pytest.fixture
def checkpoint(policy, tmp_path):
    save(*policy, tmp_path / "policy")
    return tmp_path / "policy"
