"""Kill it anywhere, run it again, lose nothing, get the same bytes.

`rlhf run arithmetic` with small settings is killed with its whole process group at random moments and run again until
it ends; every artifact must then be the one of a run that nobody disturbed. Five kills by default; `pytest -m soak`
kills a hundred times under each launcher, over recipes with a critic and with a reward model, and a few times in vLLM.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.artifacts import METRICS_FILE, Artifact
from pipeline.catalog import artifacts_of

SMALL = (
    "data.world.terms=[2,2]", "data.world.largest=60", "data.demonstrations.count=1000", "data.prompts.count=100",
    "data.held_out.count=16", "sft.batch=20", "sft.epochs=2", "scale.response_tokens=24",
    "recipe_changes.dapo.shape=[]",
    "scale.iterations=2", "scale.responses=64", "evaluation.samples=2", "evaluation.every=1",
    "feedback.prompts=40", "reward.epochs=1", "critic.pretrain_responses=64", "critic.pretrain_batch=16",
    "critic.pretrain_check_every=2", "recipe_changes.vapo.critic.pretrain_steps=6",
    "recipe_changes.vapo.rollout.group_size=8", "recipe_changes.vapo.update.minibatches=4",
    "recipe_changes.dapo.rollout.group_size=8", "recipe_changes.dapo.update.minibatches=4",
    "resources.save_every=2", "gates.reward_hacking=off", "recipe_changes.dapo.rollout.rounds=2",
)  # fmt: skip

SHORT = ("scale.iterations=1", "recipe_changes.dapo.rollout.rounds=1", "evaluation.every=0")
"""For stages in processes of their own, which take seconds to start."""


@dataclass
class Bench:
    """A folder in which one run is made undisturbed, and others are killed."""

    folder: Path
    server: str
    words: tuple[str, ...]
    killed: int = 0
    seconds: float = 0.0
    """That the undisturbed run took."""
    dice: random.Random = field(default_factory=random.Random)

    def start(self, root: str, *options: str) -> subprocess.Popen[bytes]:
        """Run it in a process group of its own."""
        changes = [word for change in (*SMALL, *self.words[1:]) for word in ("--set", change)]
        command = [
            "run",
            "arithmetic",
            "--recipe",
            self.words[0],
            "--root",
            root,
            "--name",
            "small",
            *changes,
            *options,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PREFECT_API_URL": self.server}
        with (self.folder / f"{root}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *command], cwd=self.folder, env=environment, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def undisturbed(self) -> float:
        """Make the run that the others are compared with; return the seconds that it took."""
        began = time.monotonic()
        assert self.start("whole").wait(timeout=600) == 0, (self.folder / "whole.log").read_text()
        return time.monotonic() - began

    def disturbed(self, root: str, longest: float, most: int) -> None:
        """Make it again, with up to `most` kills at random moments within `longest` seconds of each start."""
        for _ in range(most):
            process = self.start(root)
            try:
                code = process.wait(timeout=self.dice.uniform(0.3, longest))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.killed += 1
                self.assert_whole(root)
                continue
            assert code == 0, (self.folder / f"{root}.log").read_text()
            return
        assert self.start(root).wait(timeout=600) == 0, (self.folder / f"{root}.log").read_text()

    def made(self, root: str) -> Mapping[str, Artifact]:
        """Every committed artifact of a root by name."""
        place = self.folder / root
        found = [artifact for run in sorted(place.iterdir()) if run.is_dir() for artifact in artifacts_of(run)]
        return {str(artifact.path.relative_to(place)): artifact for artifact in found}

    def assert_whole(self, root: str) -> None:
        """Whatever is committed at any moment is as its manifest says."""
        if (self.folder / root).exists():
            assert [fault for one in self.made(root).values() for fault in one.faults()] == []

    def assert_same(self, root: str) -> None:
        """Nothing lost, nothing different, nothing left over."""
        expected, found = self.made("whole"), self.made(root)
        assert list(found) == list(expected)
        different = [name for name in expected if found[name].manifest.digest != expected[name].manifest.digest]
        assert different == []
        assert [path.name for path in (self.folder / root).rglob(".part-*")] == []
        for name, artifact in expected.items():
            if (weights := artifact.path / "model.safetensors").exists():
                assert (found[name].path / "model.safetensors").read_bytes() == weights.read_bytes()
            assert (found[name].path / METRICS_FILE).exists()
        link = "arithmetic-base/sft", self.folder / root / "small" / "promoted"
        assert link[1].resolve().is_dir(), link


def test_a_run_killed_at_random_moments_comes_to_the_same_bytes(tmp_path, server):
    bench = Bench(tmp_path, server, ("dapo", "resources.engine=transformers"))
    longest = bench.undisturbed()
    while bench.killed < 3:
        root = f"killed-{bench.killed}"
        bench.disturbed(root, longest, 3 - bench.killed)
        bench.assert_same(root)


@pytest.fixture(scope="module")
def processes(tmp_path_factory, server):
    """A bench whose stages run in processes of their own, one iteration of them, and its undisturbed run."""
    words = ("dapo", "resources.engine=transformers", "resources.launcher=process", *SHORT)
    bench = Bench(tmp_path_factory.mktemp("processes"), server, words)
    bench.seconds = bench.undisturbed()
    return bench


def test_stages_in_processes_killed_with_their_run_come_to_the_same_bytes(processes):
    processes.disturbed("killed", processes.seconds, 2)
    processes.assert_same("killed")


def test_one_works_another_waits_and_a_stage_killed_alone_is_told_by_its_signal(processes):
    """SIGKILL to a stage's process is what the kernel does when memory runs out."""
    first = processes.start("shared")
    note_of(processes, "shared", "rollouts-0")
    second, third = processes.start("shared"), processes.start("shared", "--wait")
    assert second.wait(timeout=120) == 1
    said = (processes.folder / "shared.log").read_text()
    assert f"process {first.pid} on" in said and "is at the run small" in said
    stage = note_of(processes, "shared", "policy")
    os.kill(int(str(stage["pid"])), signal.SIGKILL)
    assert first.wait(timeout=120) == 1
    said = (processes.folder / "shared.log").read_text()
    assert "was killed by SIGKILL" in said and "out of memory?" in said and "micro_batch_tokens" in said
    processes.assert_whole("shared")
    assert third.wait(timeout=600) == 0
    processes.assert_same("shared")


def note_of(bench: Bench, root: str, stage: str) -> dict[str, object]:
    """Who makes a stage's artifact, as soon as somebody does."""
    for _ in range(6000):
        with suppress(OSError, ValueError):  # notes come and go, and so do directories
            for note in (bench.folder / root / "small").rglob(f".part-{stage}-*/working/holder.json"):
                told: dict[str, object] = json.loads(note.read_text())
                return told
        time.sleep(0.01)
    raise TimeoutError(stage)


SOAK = [
    (recipe, "transformers", launcher, kills)
    for launcher in ("inline", "process")
    for recipe, kills in (("dapo", 70), ("vapo", 20), ("ppo", 10))
] + [("dapo", "vllm", "inline", 10)]


@pytest.mark.soak
@pytest.mark.parametrize(("recipe", "engine", "launcher", "kills"), SOAK)
def test_a_hundred_kills_lose_nothing_and_change_nothing(tmp_path, server, recipe, engine, launcher, kills):
    words = (recipe, f"resources.engine={engine}", f"resources.launcher={launcher}")
    bench = Bench(tmp_path, server, (*words, *(SHORT if launcher == "process" else ())))
    longest, stories = bench.undisturbed(), 0
    while bench.killed < kills:
        bench.disturbed(f"killed-{stories}", longest / 2, min(6, kills - bench.killed))
        bench.assert_same(f"killed-{stories}")
        stories += 1
        shutil.rmtree(tmp_path / f"killed-{stories - 1}")
    told = f"{recipe}, {engine}, {launcher}: {bench.killed} kills in {stories} runs, none lost, none different"
    sys.__stderr__.write(f"{told}\n")
