"""Checkpoints that the engine tests sample from: two that are tied, two that are not, and how to open an engine."""

from importlib import import_module

import pytest

from pipeline.engines import ENGINES, EngineOptions
from pipeline.models.checkpoint import save
from pipeline.models.fresh import ModelSpec, create

TEXT = "0123456789+-*/=() abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """tied_a, tied_b, untied_a, untied_b: two layers, 64 wide, weights wide enough for opinions."""
    room = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(["tied_a", "tied_b", "untied_a", "untied_b"]):
        spec = ModelSpec(
            layers=2, width=64, heads=2, kv_heads=1, max_position=512, tied=name.startswith("tied"), init_std=0.2
        )
        save(*create(spec, [TEXT], seed), room / name)
    return {path.name: path for path in room.iterdir()}


@pytest.fixture(scope="session")
def build():
    """Build an engine by name, past the warm one that open_engine keeps; a vLLM engine takes the place of the last."""
    last = []

    def build(name, **options):
        while name == "vllm" and last:
            last.pop().close()
        module, _, attribute = ENGINES[name].partition(":")
        settings = {"dtype": "float32", "max_model_len": 320, "max_num_seqs": 64, **options}
        engine = getattr(import_module(module), attribute)(EngineOptions(**settings))
        if name == "vllm":
            last.append(engine)
        return engine

    return build


@pytest.fixture(scope="session")
def loaded(build, checkpoints):
    """Load a checkpoint into the engine of that name, which is kept between the tests while it is sound."""
    opened = {}

    def loaded(name, checkpoint="untied_a", *, fresh=False):
        if fresh or name not in opened or opened[name].closed:
            opened[name] = build(name)
        opened[name].load(checkpoints[checkpoint])
        return opened[name]

    yield loaded
    for engine in opened.values():
        engine.close()
