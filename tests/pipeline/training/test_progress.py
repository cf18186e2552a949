"""Progress: a training that was killed ends with the bits of one that was not, and damage is passed over."""

import json
import shutil
from itertools import count

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.artifacts import Outbox
from pipeline.contracts import POLICY
from pipeline.errors import ArtifactError
from pipeline.models.fresh import ModelSpec, create
from pipeline.training.averaging import Average
from pipeline.training.batches import dealt
from pipeline.training.loop import Losses, Plan, fit
from pipeline.training.optimizer import Moments, adamw, cosine
from pipeline.training.progress import Progress, State, Weights, write_tensors

STEPS = 7


class Killed(BaseException):
    """As a signal would end it."""


class Fitting:
    """Squared error of a network with dropout."""

    groups = None

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(14, 3, generator=generator), torch.randn(14, generator=generator)
        self.lengths = torch.ones(14, dtype=torch.long).numpy()

    def passes(self, rows):
        return [rows]

    def step(self, rows):
        return len(rows)

    def losses(self, model, rows, step):
        total = (model(self.x[rows])[:, 0] - self.y[rows]).square().sum() / step
        return Losses(total, {"loss/value": float(total.detach())})

    def names(self, rows):
        return [str(row) for row in rows]


def network(width=6):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, width), nn.Dropout(0.3), nn.Tanh(), nn.Linear(width, 1))


class Training:
    """One training in one place, with an average of its weights; every call of `go` is a process of its own."""

    def __init__(self, target, every=2, width=6):
        self.target, self.every, self.width = target, every, width

    def go(self, killed_before=None):
        """All that it ends with, and how many steps it took. Dies before one of its steps if that is asked."""
        taken = count(1)

        def die(*_):
            if next(taken) == killed_before:
                raise Killed

        out = Outbox(self.target, POLICY, "hand", 1, "0" * 64, {}, {})
        hook = register_optimizer_step_pre_hook(die)
        model = network(self.width)
        optimizer, average = adamw(model, 0.05, 0.1), Average(model, 0.8, self.target)
        plan = Plan(dealt(14, 1, STEPS, 0), 2, 1.0, 10, 3)
        try:
            fit(model, Fitting(), optimizer, cosine(2, 20, 0.1), plan, out.metrics, average, Progress(out, self.every))
        finally:
            hook.remove()
            out.close()
        rows = [row for row in out.metrics.rows if not row["name"].startswith("speed/")]
        tensors = {f"{i}/{n}": t for i, part in enumerate((Weights(model), Moments(optimizer), average))
                   for n, t in part.state().tensors.items()}  # fmt: skip
        return tensors, rows, next(taken) - 1

    def dies(self, before):
        with pytest.raises(Killed):
            self.go(before)

    @property
    def savings(self):
        return sorted((self.target.parent / ".part-run-00000000" / "working" / "progress").glob("*"))

    @property
    def log(self):
        return (self.target.parent / ".part-run-00000000" / "log.txt").read_text()


def same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a training ends with that nothing happens to."""
    return Training(tmp_path_factory.mktemp("whole") / "run", every=0).go()


@pytest.fixture
def training(tmp_path):
    return Training(tmp_path / "run")


def test_saving_changes_nothing_and_keeps_the_last_alone(training, whole):
    same(training.go(), whole)
    assert [path.name[:9] for path in training.savings] == ["00000006-"]
    assert "going on" not in training.log


@pytest.mark.parametrize("before", range(1, STEPS + 1))
def test_whichever_step_it_is_killed_before_it_ends_with_the_same_bits(training, whole, before):
    training.dies(before)
    found, saved = training.go(), (before - 1) // 2 * 2
    same(found, whole)
    assert found[2] == STEPS - saved
    assert (f"going on from step {saved} of 7" in training.log) == (saved > 0)


def test_killed_again_and_again_it_arrives(training, whole):
    for _ in range(3):
        training.dies(3)
    found = training.go()
    same(found, whole)
    assert found[2] == 1
    assert [f"going on from step {step} of 7" in training.log for step in (2, 4, 6)] == [True] * 3


def test_what_is_random_differs_from_step_to_step(whole, tmp_path):
    """Or the tests above would see nothing of it."""
    quiet = Training(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.loop.derive", lambda *_: 0)
        assert not torch.equal(quiet.go()[0]["0/0.weight"], whole[0]["0/0.weight"])


def test_never_saving_leaves_nothing(tmp_path, whole):
    training = Training(tmp_path / "run", every=0)
    training.dies(7)
    assert training.savings == []
    found = training.go()
    same(found, whole)
    assert found[2] == STEPS


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def turned(path):
    """One bit of a number, which stays a number."""
    content = bytearray(path.read_bytes())
    place = content.index(b'"value": ') + 12 if path.suffix == ".json" else -2
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.json", "rank-0-of-1.safetensors"])
@pytest.mark.parametrize("damage", [cut, turned, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_damage_is_passed_over(training, whole, name, damage):
    training.dies(6)
    [saving] = training.savings
    damage(saving / name)
    found = training.go()
    same(found, whole)
    assert found[2] == STEPS
    assert "not going on from step 4, what was saved there is of no use: " in training.log
    assert [path.name[:9] for path in training.savings] == ["00000006-"]


def test_of_two_savings_the_one_before_stands_in_for_a_damaged_one(training, whole, tmp_path):
    training.dies(4)
    [first] = training.savings
    shutil.copytree(first, tmp_path / "kept")
    training.dies(4)
    shutil.copytree(tmp_path / "kept", first)
    _, last = training.savings
    cut(last / "rank-0-of-1.safetensors")
    found = training.go()
    same(found, whole)
    assert found[2] == STEPS - 2
    assert "not going on from step 4" in training.log
    assert training.log.endswith("going on from step 2 of 7\n")


def test_of_two_savings_the_last_counts(training, whole, tmp_path):
    """The one before was about to be deleted."""
    training.dies(4)
    [first] = training.savings
    shutil.copytree(first, tmp_path / "kept")
    training.dies(4)
    shutil.copytree(tmp_path / "kept", first)
    (first / "state.json").unlink()
    found = training.go()
    same(found, whole)
    assert found[2] == STEPS - 4
    assert "of no use" not in training.log


def test_half_a_saving_is_no_saving(training, whole):
    training.dies(4)
    [first] = training.savings
    shutil.copytree(first, first.parent / "unfinished")
    cut(first.parent / "unfinished" / "rank-0-of-1.safetensors")
    found = training.go()
    same(found, whole)
    assert found[2] == STEPS - 2
    assert "of no use" not in training.log


def test_what_another_program_saved_is_no_damage_and_is_refused(training):
    training.dies(4)
    with pytest.raises(ArtifactError, match=r"another program saved this training: model: 0\.weight of shape") as error:
        Training(training.target, width=8).go()
    assert "run again" in error.value.do


def test_tied_weights_are_kept_once_and_buffers_that_share_memory_as_often_as_they_are(tmp_path):
    model, _ = create(ModelSpec(layers=1, width=32, heads=1, kv_heads=1, tied=True), ["abc"], 0)
    model.register_buffer("scale", torch.arange(4.0))
    model.register_buffer("part", model.scale[:2])
    state = Weights(model).state()
    assert "lm_head.weight" not in state.tensors
    write_tensors(tmp_path / "tensors", state.tensors)
    kept = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
    with torch.no_grad():
        for value in (*model.parameters(), model.scale):
            value.zero_()
    Weights(model).resume(State(kept, {}))
    assert all(torch.equal(kept[name], tensor) for name, tensor in Weights(model).state().tensors.items())
    assert torch.equal(model.lm_head.weight, kept["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="only one of model and file has part, scale"):
        Weights(network()).resume(State({**Weights(network()).state().tensors, "part": 0, "scale": 0}, {}))


def test_a_saving_is_plain_to_read(training):
    training.dies(4)
    [saving] = training.savings
    told = json.loads((saving / "state.json").read_text())
    assert {row["step"] for row in told["rows"]} == {11, 12}
    assert told["values"].keys() == {"model", "optimizer", "watcher"}
