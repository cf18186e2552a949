"""One small policy, on disk and in memory, for the tests of models."""

import pytest

from pipeline.models.checkpoint import fresh_critic, fresh_reward_model, save
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


def _apart(model):
    """A head wide enough for opinions."""
    model.score.weight.data *= 25
    return model


@pytest.fixture(scope="session")
def judges(policy, tmp_path_factory):
    """Directories of the policy, of a reward model with a bias and of a critic; nobody may write there."""
    room = tmp_path_factory.mktemp("judges")
    save(*policy, room / "policy")
    reward_model = _apart(fresh_reward_model(room / "policy", seed=1))
    reward_model.config.reward_bias = -0.75
    save(reward_model, policy[1], room / "reward_model")
    critic = _apart(fresh_critic(room / "policy", seed=2))
    critic.score.bias.data.fill_(0.5)
    save(critic, policy[1], room / "critic")
    return room
