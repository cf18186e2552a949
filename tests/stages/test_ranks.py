"""Two processes under torchrun: the losses and weights of one, for every stage that trains or reads with a model."""

import json
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.algorithms.recipe import Recipe
from pipeline.artifacts import Artifact
from pipeline.contracts import ADVANTAGES, DOCUMENTS, RANKINGS
from pipeline.errors import ContractError, ExperimentError
from pipeline.experiment import Experiment
from pipeline.launch import launch
from pipeline.models.checkpoint import load_policy
from pipeline.models.device import device
from pipeline.models.distributed import card_of
from pipeline.training.averaging import FOLDER as AVERAGE
from stages.label import Settings as LabelSettings
from stages.label import label
from stages.reward import Settings as RewardSettings
from stages.reward import reward
from stages.score import Settings as ScoreSettings
from stages.score import score
from stages.sft import sft
from stages.update import Settings as UpdateSettings
from stages.update import update
from stages.value import Settings as ValueSettings
from stages.value import value

TRAINED = [
    "sft", "reward", "pretraining", "value", "one step", "three steps", "going on", "moments aside", "adapters"
]  # fmt: skip
EXPERIMENT = Path(__file__).parents[2] / "flows" / "experiments" / "arithmetic.toml"
TOLERANCE = 1e-5
ROWS = 23
"""Responses, dealt to steps of uneven size."""


TORCHRUN = [sys.executable, "-m", "pipeline.torchrun", "--standalone", "--nproc-per-node=2"]


def by_torchrun(stage, out, settings, **inputs):
    return [*TORCHRUN, *stage.command(out, settings, **inputs)[1:]]


def begun(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


EVERY_STAGE = """
import importlib, json, sys
from pathlib import Path
from pipeline.lifeline import left_at_once
from pipeline.models.checkpoint import load_policy
from pipeline.models.distributed import everybody, joined, own, shard
from pipeline.ranks import rank

room = Path(sys.argv[1])

def placed(policy):
    model = shard(load_policy(policy, "float32"))
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "devices": sorted({own(tensor).device.type for tensor in tensors}),
        "held": everybody(sum(own(weights).numel() for weights in model.parameters())),
    }

with left_at_once(), joined():
    for module, name, *words in json.loads((room / "asked.json").read_text()):
        getattr(importlib.import_module(module), name).main(words)
    told = placed(Path(sys.argv[2]))
    if rank() == 0:
        (room / "placed.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def ranks_room(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def pairs(plans, policy, ranks_room):
    """Name -> the artifact of one process, and that of two; those two make all of them, one after the other."""
    room = ranks_room
    alone, asked = {}, []
    for name, (stage, settings, inputs) in plans.items():
        alone[name] = stage.run(room / f"{name}-1", settings, **inputs)
        _, _, module, *words = stage.command(room / f"{name}-2", settings, **inputs)
        asked.append([module, stage.name, *words])
    (room / "asked.json").write_text(json.dumps(asked))
    (room / "every_stage.py").write_text(EVERY_STAGE)
    with begun([*TORCHRUN, str(room / "every_stage.py"), str(room), str(policy.path)]) as process:
        said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert said.count("  digest ") == len(plans), "rank 0 alone speaks"
    return {name: (made, Artifact.open(room / f"{name}-2")) for name, made in alone.items()}


def same_weights(one, two, folder="."):
    files = sorted(path.relative_to(one.path) for path in (one.path / folder).rglob("*.safetensors"))
    assert files, folder
    for file in files:
        first, second = load_file(one.path / file), load_file(two.path / file)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=TOLERANCE)


def names(made):
    return sorted(path.relative_to(made.path) for path in made.path.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def written(rollouts, by_hand):
    """Write responses of several lengths with advantages of both signs, returns, and old log-probabilities or none."""

    def write(*, old=False):
        return by_hand(ADVANTAGES, table_of(rollouts, old=old))

    return write


def table_of(rollouts, *, old):
    drawn = np.random.default_rng(0)
    rows = []
    for number, row in enumerate(rollouts.table().to_pylist()[:ROWS]):
        count = len(row["response_tokens"])
        kept = {
            name: row[name] for name in ("prompt_id", "sample", "prompt_tokens", "response_tokens", "sampler_logprobs")
        }
        rows.append(
            kept | {
                "advantages": [1.0 - number % 3] * count, "returns": drawn.normal(size=count).tolist(), "reward": 0.0,
                "shaped_reward": 0.0, "correct": number % 2 == 0, "finished": True,
            } | ({"old_logprobs": row["sampler_logprobs"]} if old else {})
        )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def documents(by_hand):
    return by_hand(
        DOCUMENTS, [{"document_id": f"d{n}", "text": "12+34=46;" * (n % 3 + 1), "source": "here"} for n in range(9)]
    )


@pytest.fixture(scope="module")
def rankings(by_hand):
    drawn = random.Random(1)
    texts = [[f"{drawn.randrange(10 ** drawn.randint(1, 6))}{k}" for k in range(3)] for _ in range(29)]
    return by_hand(
        RANKINGS,
        [
            {
                "ranking_id": f"r{n}", "prompt_id": f"p{n}", "messages": [{"role": "user", "content": f"{n % 10}+1="}],
                "responses": some, "ranks": [0, 1, 2], "annotator": None, "source": None,
            }
            for n, some in enumerate(texts)
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def plans(sft_settings, demonstrations, documents, rankings, policy, other_policy, rollouts, written, tmp_path_factory):
    """Name -> stage, settings and inputs; steps of uneven size, cut into many micro-batches."""
    small = {"micro_batch_tokens": 64, "learning_rate": 1e-3}
    looking = {"epochs": 3, "batch": 6, "tokens": 32, "held_out_share": 0.25, "check_every": 2}
    recipe, responses, old = Recipe.load("dapo"), written(), written(old=True)

    def regression(**changes):
        return ValueSettings.of(None, {"loss": {"kind": "value_squared"}, **small, **changes})

    def improvement(minibatches, recompute=False, ema=0.9, **changes):
        plan = recipe.update.model_copy(update={"minibatches": minibatches, "epochs": 1, "ema": ema})
        return UpdateSettings.of(
            None,
            {
                "loss": recipe.loss,
                "update": plan,
                "mix": {"per_response": 0.5, "coef": 0.3},
                "recompute": recompute,
                **small,
                **changes,
            },
        )

    critic = {"advantages": responses.path, "policy": policy.path}
    stepped = update.run(
        tmp_path_factory.mktemp("stepped") / "policy", improvement(1), **critic, documents=documents.path
    )
    further = {"advantages": old.path, "policy": stepped.path, "documents": documents.path}
    return {
        "sft": (
            sft, sft_settings(epochs=6, batch=7, documents_share=0.2, save_every=5, **small),
            {"demonstrations": demonstrations.path, "documents": documents.path},
        ),
        "reward": (
            reward, RewardSettings.of(None, {**looking, **small}),
            {"rankings": rankings.path, "policy": policy.path, "demonstrations": demonstrations.path},
        ),
        "pretraining": (value, regression(steps=7, batch=5, check_every=3), critic),
        "value": (value, regression(epochs=2, minibatches=3, recompute=True), critic),
        "score": (
            score, ScoreSettings.of(None, {"needs": ["old_logprobs", "ref_logprobs"], "micro_batch_tokens": 64}),
            {"rollouts": [rollouts.path], "policy": policy.path, "reference": other_policy},
        ),
        "one step": (update, improvement(1), {**critic, "documents": documents.path}),
        "three steps": (
            update, improvement(3, recompute=True),
            {"advantages": old.path, "policy": policy.path, "documents": documents.path},
        ),
        "going on": (update, improvement(3), further),
        "moments aside": (update, improvement(3, offload=True), further),
        "adapters": (
            update, improvement(3, recompute=True, ema=None, lora={"rank": 3, "alpha": 6}),
            {"advantages": old.path, "policy": policy.path, "documents": documents.path},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", [*TRAINED, "score"])
def test_two_processes_have_the_losses_of_one(pairs, numbers, name):
    one, two = pairs[name]
    assert names(one) == names(two)
    assert one.manifest.fingerprint == two.manifest.fingerprint
    first, second = numbers(one), numbers(two)
    assert first.keys() == second.keys()
    for key, found in first.items():
        if not key[0].startswith(("speed/", "time/")):
            near = TOLERANCE if key[0].startswith("loss/") else 1e-3
            assert second[key] == pytest.approx(found, rel=near, abs=TOLERANCE), key
    assert name == "score" or len([key for key in first if key[0] == "loss/total"]) >= 1


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_have_the_weights_of_one(pairs, name):
    same_weights(*pairs[name])


def test_two_processes_keep_the_average_of_one(pairs):
    for name in ("one step", "three steps"):
        same_weights(*pairs[name], AVERAGE)


def test_two_processes_read_what_one_reads(pairs):
    first, second = (made.table() for made in pairs["score"])
    assert first.select(["prompt_id", "sample"]) == second.select(["prompt_id", "sample"])
    for name in ("old_logprobs", "ref_logprobs"):
        here, there = (table[name].combine_chunks().flatten().to_numpy() for table in (first, second))
        np.testing.assert_allclose(there, here, rtol=0, atol=TOLERANCE)


def test_each_of_two_processes_holds_half_of_the_weights_on_its_own_device(pairs, ranks_room, policy):
    assert pairs
    told = json.loads((ranks_room / "placed.json").read_text())
    assert told["devices"] == [device().type]
    whole = load_policy(policy.path, "float32").num_parameters()
    assert sum(told["held"]) == whole
    assert max(told["held"]) == pytest.approx(whole / 2, rel=0.01)


def test_a_process_that_has_no_gpu_of_its_own_is_refused():
    assert [card_of(number, 2) for number in range(2)] == [0, 1]
    with pytest.raises(ExperimentError, match=r"(?s)number 2 .*has 2 GPUs.*resources\.torchrun.*--nproc-per-node=2"):
        card_of(2, 2)


def test_moments_in_the_host_s_memory_change_no_bit_of_what_two_processes_make(pairs):
    (_, here), (_, aside) = pairs["going on"], pairs["moments aside"]
    assert here.manifest.settings["offload"] is False and aside.manifest.settings["offload"] is True
    assert aside.manifest.digest == here.manifest.digest


def test_one_process_goes_on_where_two_have_ended(pairs, plans, tmp_path):
    stage, settings, inputs = plans["three steps"]
    again = [
        stage.run(tmp_path / str(number), settings, **inputs | {"policy": made.path})
        for number, made in enumerate(pairs["three steps"])
    ]
    assert [made.stats["steps"] for made in again] == [6, 6]
    same_weights(*again)


def test_two_processes_that_were_killed_go_on(pairs, plans, tmp_path):
    stage, settings, inputs = plans["sft"]
    command = by_torchrun(stage, tmp_path / "out", settings, **inputs)
    with begun(command) as process:
        wait_for(lambda: list(tmp_path.glob(".part-out-*/working/progress/[0-9]*")), process)
        end(process)
    assert not (tmp_path / "out").exists()
    with begun(command) as process:
        said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said[-3000:]
    assert "going on from step" in said
    assert Artifact.open(tmp_path / "out").manifest.digest == pairs["sft"][1].manifest.digest


def wait_for(seen, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not seen():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(process):
    """Kill it and its processes, without a word."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    psutil.wait_procs(family, timeout=30)


@pytest.fixture
def launched(tmp_path):
    """Launches a stage by torchrun, as the resources of an experiment say."""
    changes = ["resources.launcher=torchrun", 'resources.torchrun=["--standalone", "--nproc-per-node=2"]']
    experiment = Experiment.load(EXPERIMENT, changes)
    file = tmp_path / "experiment.toml"
    file.write_text(experiment.dump(), encoding="utf-8")
    return partial(launch, experiment=(experiment, file))


def test_what_goes_wrong_in_two_processes_is_raised_here_once(launched, tmp_path, sft_settings, demonstrations):
    others = {*psutil.Process().children()}
    settings = sft_settings(tokens=2)
    with pytest.raises(ContractError) as alone:
        sft.run(tmp_path / "alone", settings, demonstrations=demonstrations.path)
    with pytest.raises(ContractError) as caught:
        launched(sft, tmp_path / "out", settings, demonstrations=demonstrations.path)
    assert str(caught.value) == str(alone.value)
    assert {*psutil.Process().children()} <= others


def test_what_is_launched_by_torchrun_is_what_torchrun_by_hand_makes(launched, pairs, plans, tmp_path):
    stage, settings, inputs = plans["sft"]
    made = launched(stage, tmp_path / "out", settings, **inputs)
    one, two = pairs["sft"]
    assert made == Artifact.open(tmp_path / "out")
    assert made.manifest.digest == two.manifest.digest
    assert made.manifest.digest != one.manifest.digest, "two processes add in another order: there were two"
    assert made.manifest.fingerprint == one.manifest.fingerprint


def test_stages_that_read_no_model_run_in_one_process(launched, tmp_path, rollouts, prompts):
    settings = LabelSettings.of(None, {"label": {"kind": "verifier"}})
    made = launched(label, tmp_path / "labels", settings, rollouts=rollouts.path, prompts=prompts.path)
    assert "torchrun" not in made.manifest.made["command"]
    assert made.manifest.stats["rows"] == rollouts.manifest.stats["rows"]
