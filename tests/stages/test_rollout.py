import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline import engines
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import PROMPTS
from pipeline.engines import Completion, Memory, Sampling
from pipeline.engines.scripted import ScriptedEngine
from pipeline.engines.transformers import TransformersEngine
from pipeline.errors import ArtifactError, ContractError, EngineError, ExperimentError, StorageError
from pipeline.experiment import Experiment
from pipeline.journal import Journal
from pipeline.models.checkpoint import load_policy, save
from pipeline.models.forward import response_logprobs
from pipeline.models.fresh import ModelSpec, create
from pipeline.sources.rows import identity
from pipeline.text import Chat
from stages.rollout import (
    Asked,
    Settings,
    _options,
    occurrences,
    questions,
    refuse_foreign,
    repeated,
    rollout,
    short_enough,
    stream,
    tokenized,
    whole_groups,
)

ROOT = Path(__file__).parents[2]
SIZES = st.integers(1, 12)


@pytest.fixture
def scripted(policy, tmp_path):
    """The session's policy with a script: prompt text -> responses, as texts without the end token."""

    def write(script, name="scripted"):
        place = shutil.copytree(policy.path, tmp_path / name, ignore=shutil.ignore_patterns("manifest.json"))
        chat = Chat(place)
        lines = {}
        for prompt, responses in script.items():
            tokens = chat.prompt_tokens([{"role": "user", "content": prompt}])
            key = prompt if prompt == "*" else ",".join(map(str, tokens))
            lines[key] = [chat.response_tokens(response) for response in responses]
        (place / "script.json").write_text(json.dumps(lines))
        return place

    return write


@pytest.fixture(scope="module")
def five(by_hand):
    """Five prompts, the last longer than eight tokens."""
    texts = ["1+1=", "1+2=", "2+2=", "3+3=", "1+2+3+4+5="]
    messages = [[{"role": "user", "content": text}] for text in texts]
    rows = [
        {"prompt_id": identity(m), "messages": m, "answer": None, "grader": "none", "source": "hand"} for m in messages
    ]
    return by_hand(PROMPTS, rows)


def asked_texts(artifact, policy):
    chat = Chat(policy)
    return [chat.decode(tokens) for tokens in artifact.table()["prompt_tokens"].to_pylist()]


@given(size=SIZES, first=st.integers(0, 40), count=st.integers(0, 40), seed=st.integers(0, 2**40))
def test_a_piece_of_the_stream_is_the_piece_of_the_whole(size, first, count, seed):
    assert stream(size, first, count, seed) == stream(size, 0, first + count, seed)[first:]


@given(size=SIZES, epochs=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_every_prompt_comes_once_per_epoch(size, epochs, seed):
    drawn = stream(size, 0, size * epochs, seed)
    for epoch in range(epochs):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_each_epoch_has_its_own_order_and_so_has_each_seed():
    assert len({tuple(stream(20, 20 * epoch, 20, seed)) for epoch in range(5) for seed in range(5)}) == 25


@given(st.lists(st.sampled_from("abc")))
def test_later_draws_have_names_of_their_own(drawn):
    names = occurrences(drawn)
    assert len(set(names)) == len(names)
    assert [name.partition("#")[0] for name in names] == drawn
    for letter, times in Counter(drawn).items():
        mine = [name for name in names if name[0] == letter]
        assert mine == [letter, *(f"{letter}#{n}" for n in range(1, times))]


@given(rounds=st.lists(st.integers(1, 9), min_size=1, max_size=4), start=st.integers(0, 20))
def test_rounds_of_one_iteration_never_share_a_name(five, policy, sampling, rounds, start):
    ids, tokens = five.table()["prompt_id"].to_pylist(), tokenized(five, Chat(policy.path))
    cursor, names = start, []
    for count in rounds:
        asked, too_long = questions(ids, tokens, sampling(first=cursor, since=start, count=count))
        assert (len(asked), too_long) == (count, 1)
        names += [one.prompt_id for one in asked]
        cursor += count
    at_once, _ = questions(ids, tokens, sampling(first=start, since=start, count=sum(rounds)))
    assert names == [one.prompt_id for one in at_once]
    assert len(set(names)) == len(names)


def test_groups_are_complete_and_in_the_order_of_the_stream(rollouts, prompts, policy, sampling, sound):
    sound(rollouts)
    settings, ids = sampling(), prompts.table()["prompt_id"].to_pylist()
    rows = rollouts.table().to_pylist()
    expected = [ids[place] for place in stream(len(ids), 0, settings.count, settings.seed)]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(name, s) for name in expected for s in range(4)]
    assert [part.num_rows for part in rollouts.parts()] == [20, 20, 8]
    chat = Chat(policy.path)
    asked = {row["prompt_id"]: row["messages"] for row in prompts.table().to_pylist()}
    for row in rows:
        assert row["prompt_tokens"] == chat.prompt_tokens(asked[row["prompt_id"]])
        assert row["response"] == chat.decode(row["response_tokens"])
        assert (row["finish"] == "stop") == (row["response_tokens"][-1] in chat.stop_ids)
        assert row["finish"] == "stop" or len(row["response_tokens"]) == settings.response_tokens
        assert len(row["sampler_logprobs"]) == len(row["response_tokens"])
    assert {row["finish"] for row in rows} >= {"stop"}
    assert len({row["seed"] for row in rows}) == len(rows)


def test_the_cursor_and_the_numbers(rollouts, sampling, numbers, room, prompts, policy):
    rows = rollouts.table().to_pylist()
    lengths = [len(row["response_tokens"]) for row in rows]
    assert (rollouts.stats["cursor"], rollouts.stats["rejected"]) == (12, 0)
    assert rollouts.stats["tokens"] == sum(lengths)
    measured = numbers(rollouts)
    assert measured["length/mean", 0] == pytest.approx(sum(lengths) / len(lengths))
    assert measured["length/max", 0] == max(lengths)
    assert measured["length/cut", 0] == pytest.approx(sum(row["finish"] == "length" for row in rows) / len(rows))
    assert measured["speed/tokens_per_second", 0] > 0
    later = rollout.run(
        room / "later", sampling(first=18, since=12, count=10, draw="1"), prompts=prompts.path, policy=policy.path
    )
    assert later.stats["cursor"] == 28


def test_the_file_says_under_which_distribution(rollouts, policy, sampling):
    for path in rollouts.part_paths():
        metadata = {key.decode(): value.decode() for key, value in pq.read_schema(path).metadata.items()}
        assert metadata.items() >= Chat(policy.path).metadata().items()
        assert metadata.items() >= {
            "engine": "transformers", "dtype": "float32", "temperature": "1.0", "top_p": "1.0", "top_k": "None",
            "policy_digest": policy.manifest.digest, "contract": "rollouts",
        }.items()  # fmt: skip
        assert metadata["version"]
        assert metadata["logprobs_mode"]


def test_the_same_twice_and_something_else_in_another_draw(rollouts, prompts, policy, sampling, room):
    def digest(name, **changes):
        settings = sampling(**changes)
        return rollout.run(room / name, settings, prompts=prompts.path, policy=policy.path).manifest.digest

    assert digest("rollouts again") == rollouts.manifest.digest
    assert len({rollouts.manifest.digest, digest("draw", draw="1"), digest("seed", seed=8)}) == 3


def test_a_response_does_not_depend_on_how_prompts_are_dealt_to_parts(rollouts, prompts, policy, sampling, room):
    whole = rollout.run(room / "whole", sampling(shard=100), prompts=prompts.path, policy=policy.path)
    one, other = (a.table().drop_columns("sampler_logprobs").to_pylist() for a in (rollouts, whole))
    assert one == other


def test_without_a_count_every_prompt_is_asked_once_in_order(prompts, policy, sampling, tmp_path):
    made = rollout.run(
        tmp_path / "all", sampling(count=None, group_size=1), prompts=prompts.path, policy=policy.path
    )  # fmt: skip
    assert made.table()["prompt_id"].to_pylist() == prompts.table()["prompt_id"].to_pylist()


def test_a_second_draw_is_a_group_of_its_own(five, scripted, sampling, tmp_path):
    settings = sampling(engine="scripted", count=10, group_size=2)
    made = rollout.run(tmp_path / "out", settings, prompts=five.path, policy=scripted({"*": ["1"]}))
    made.check()
    names = made.table()["prompt_id"].to_pylist()
    assert len(set(names)) == 10
    assert Counter(name.partition("#")[2] for name in names) == {"": 8, "1": 8, "2": 4}
    seeds = made.table()["seed"].to_pylist()
    assert len(set(seeds)) == len(seeds)


def test_too_long_prompts_are_counted_and_never_asked_or_cut(five, scripted, sampling, tmp_path, numbers):
    policy = scripted({"*": ["1"]})
    made = rollout.run(
        tmp_path / "out", sampling(engine="scripted", count=4, group_size=1), prompts=five.path, policy=policy
    )
    assert sorted(asked_texts(made, policy)) == ["1+1=", "1+2=", "2+2=", "3+3="]
    assert made.stats["rejected"] == numbers(made)["rows/rejected", 0] == 1
    assert made.stats["cursor"] == 4
    assert "1 prompts are longer than 8 tokens" in (made.path / "log.txt").read_text()
    with pytest.raises(ContractError, match="all 5 prompts are longer than 2 tokens"):
        rollout.run(tmp_path / "none", sampling(engine="scripted", prompt_tokens=2), prompts=five.path, policy=policy)
    assert not (tmp_path / "none").exists()


def test_a_prompt_as_long_as_the_limit_is_asked():
    assert short_enough([[1] * 8, [1] * 9, [1]], 8) == [0, 2]


def test_the_order_of_completions_does_not_matter_and_a_missing_one_does():
    asked, plan = [Asked("a", [4], 0), Asked("b", [5], 0)], Sampling(group_size=2, max_tokens=4, stop_ids=(1,))
    said = [Completion(prompt, s, [6 + prompt, 4 + s, 1], [-1.0] * 3, "stop", s) for prompt in (0, 1) for s in (0, 1)]
    assert list(whole_groups(asked, said, plan)) == [(0, said[:2]), (1, said[2:])]
    assert list(whole_groups(asked, said[::-1], plan)) == [(1, said[2:]), (0, said[:2])]
    assert list(whole_groups(asked, said[2:], plan, done={0})) == [(1, said[2:])]
    found = whole_groups(asked, said[:3], plan)
    assert next(found) == (0, said[:2])
    with pytest.raises(EngineError, match="1 of 2 responses") as error:
        next(found)
    assert error.value.where == "prompt b"


def test_the_greedy_response_is_sample_minus_one(prompts, policy, sampling, tmp_path):
    settings = sampling(greedy=True, group_size=2, count=3)
    rows = rollout.run(tmp_path / "a", settings, prompts=prompts.path, policy=policy.path).table().to_pylist()
    assert [row["sample"] for row in rows] == [-1, 0, 1] * 3
    other = sampling(greedy=True, group_size=2, count=3, draw="other")
    again = rollout.run(tmp_path / "b", other, prompts=prompts.path, policy=policy.path).table().to_pylist()
    assert [row["response"] for row in rows[::3]] == [row["response"] for row in again[::3]]


def test_beams_are_a_groups_likeliest_responses_without_log_probabilities(prompts, policy, sampling, tmp_path, sound):
    settings = sampling(beams=4, group_size=3, count=4)
    made = rollout.run(tmp_path / "out", settings, prompts=prompts.path, policy=policy.path)
    sound(made)
    assert {path: pq.read_schema(path).metadata[b"beams"] for path in made.part_paths()} == {made.part_paths()[0]: b"4"}
    rows = made.table().to_pylist()
    assert {row["sampler_logprobs"] for row in rows} == {None}
    assert len({row["seed"] for row in rows}) == 4
    with torch.no_grad():
        tokens = ([row[name] for row in rows] for name in ("prompt_tokens", "response_tokens"))
        scores = response_logprobs(load_policy(policy.path, "float32"), *tokens).logprobs.sum(dim=1).reshape(4, 3)
    assert (scores[:, :-1] > scores[:, 1:]).all()


def test_beams_that_would_draw_are_refused_with_the_settings(sampling):
    with pytest.raises(ExperimentError, match="leave temperature, top_p, top_k and greedy at their defaults"):
        sampling(beams=4, temperature=0.7)
    with pytest.raises(ExperimentError, match="beams = 3 cannot give group_size = 4 responses"):
        sampling(beams=3)


def test_cut_responses_say_so(prompts, policy, sampling, tmp_path, numbers):
    settings = sampling(response_tokens=3, count=2)
    made = rollout.run(tmp_path / "out", settings, prompts=prompts.path, policy=policy.path)
    assert set(made.table()["finish"].to_pylist()) == {"length"}
    assert numbers(made)["length/cut", 0] == 1.0


@pytest.fixture
def full_disk(monkeypatch):
    """The disk is full when so many groups have been kept; `undo` makes room."""

    def after(groups):
        add, kept = Journal.add, []

        def add_or_fail(journal, entry):
            if len(kept) == groups:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            kept.append(add(journal, entry))

        monkeypatch.setattr(Journal, "add", add_or_fail)
        return monkeypatch

    return after


def scratch_of(place):
    (scratch,) = place.parent.glob(f".part-{place.name}-*")
    return scratch


@pytest.mark.parametrize("kept", [0, 1, 5, 7])
@pytest.mark.parametrize("damage", [None, b'9f2c04d1a7b35e60 ["half a li', b"\xff\x00\n"])
def test_an_interrupted_sampling_ends_with_the_very_bytes_of_an_uninterrupted_one(
    rollouts, prompts, policy, sampling, tmp_path, full_disk, kept, damage
):
    out, inputs = tmp_path / "rollouts", {"prompts": prompts.path, "policy": policy.path}
    disk = full_disk(kept)
    with pytest.raises(StorageError, match="disk is full"):
        rollout.run(out, sampling(), **inputs)
    disk.undo()
    scratch = scratch_of(out)
    parts = {path.name: path.stat().st_ino for path in scratch.glob("part-*")}
    (journal,) = (scratch / "working").glob("groups-*")
    assert (len(parts), len(journal.read_bytes().splitlines())) == divmod(kept, 5)
    if damage is not None:
        with journal.open("ab") as lines:
            lines.write(damage)
    made = rollout.run(out, sampling(), **inputs)
    assert made.manifest.digest == rollouts.manifest.digest
    assert {name: (made.path / name).stat().st_ino for name in parts} == parts
    quantities = {name: value for name, value in rollouts.stats.items() if name != "seconds"}
    assert {name: made.stats[name] for name in quantities} == quantities
    assert sorted(path.name for path in made.path.iterdir()) == sorted(path.name for path in rollouts.path.iterdir())


def test_only_what_is_missing_is_sampled_again(prompts, policy, sampling, tmp_path, full_disk, monkeypatch, numbers):
    settings, inputs = sampling(count=80, shard=80), {"prompts": prompts.path, "policy": policy.path}
    whole = rollout.run(tmp_path / "whole", settings, **inputs)
    disk = full_disk(70)
    with pytest.raises(StorageError):
        rollout.run(tmp_path / "out", settings, **inputs)
    disk.undo()
    generate, asked, told = TransformersEngine.generate, [], []

    def watched(engine, request, plan, then):
        asked.append((len(request.prompts), len(request.done)))
        for completion in generate(engine, request, plan, then):
            told.append(completion)
            yield completion

    monkeypatch.setattr(TransformersEngine, "generate", watched)
    made = rollout.run(tmp_path / "out", settings, **inputs)
    assert asked == [(80, 70)]
    assert len(told) == 40
    assert made.manifest.digest == whole.manifest.digest
    assert numbers(made)["speed/tokens_per_second", 0] > 0


def test_an_engine_is_told_what_of_the_next_part_is_missing(
    rollouts, prompts, policy, sampling, tmp_path, full_disk, monkeypatch
):
    out, inputs = tmp_path / "rollouts", {"prompts": prompts.path, "policy": policy.path}
    disk = full_disk(7)
    with pytest.raises(StorageError):
        rollout.run(out, sampling(), **inputs)
    disk.undo()
    (scratch_of(out) / "part-00000.parquet").unlink()
    generate, asked = TransformersEngine.generate, []

    def watched(engine, request, plan, then):
        asked.append((request, then))
        return generate(engine, request, plan, then)

    monkeypatch.setattr(TransformersEngine, "generate", watched)
    made = rollout.run(out, sampling(), **inputs)
    assert made.manifest.digest == rollouts.manifest.digest
    requests = [request for request, _ in asked]
    assert [then for _, then in asked] == [*requests[1:], None]
    assert [(len(one.prompts), len(one.done)) for one in requests] == [(5, 0), (5, 2), (2, 0)]


def test_groups_kept_under_another_engine_are_sampled_again(prompts, policy, sampling, tmp_path, full_disk, rollouts):
    out, inputs = tmp_path / "rollouts", {"prompts": prompts.path, "policy": policy.path}
    disk = full_disk(3)
    with pytest.raises(StorageError):
        rollout.run(out, sampling(), **inputs)
    disk.undo()
    journal = scratch_of(out) / "working" / "groups-00000.jsonl"
    kept = journal.read_bytes()
    journal.unlink()
    with Journal(journal, under={"version": "another"}) as other:
        for line in kept.splitlines():
            prompt_id, group = json.loads(line.partition(b" ")[2])
            other.add([prompt_id, [[sample, [5], [-1.0], "length", seed] for sample, *_, seed in group]])
    assert rollout.run(out, sampling(), **inputs).manifest.digest == rollouts.manifest.digest


def test_a_crash_before_the_commit_samples_nothing_again(
    rollouts, prompts, policy, sampling, tmp_path, numbers, monkeypatch
):
    def die(outbox):
        raise KeyboardInterrupt

    with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):
        changed.setattr(Outbox, "commit", die)
        rollout.run(tmp_path / "rollouts", sampling(), prompts=prompts.path, policy=policy.path)
    resumed = rollout.run(tmp_path / "rollouts", sampling(), prompts=prompts.path, policy=policy.path)
    assert resumed.manifest.digest == rollouts.manifest.digest
    assert ("speed/tokens_per_second", 0) not in numbers(resumed)
    assert numbers(resumed)["length/mean", 0] == numbers(rollouts)["length/mean", 0]


def test_what_was_finished_before_the_engine_failed_is_kept(five, scripted, sampling, tmp_path):
    policy = scripted({text: ["1"] for text in ("1+1=", "1+2=", "2+2=")})
    with pytest.raises(EngineError, match="no line for"):
        rollout.run(
            tmp_path / "parts", sampling(engine="scripted", count=None, shard=1), prompts=five.path, policy=policy
        )
    assert not (tmp_path / "parts").exists()
    names = sorted(path.name for path in scratch_of(tmp_path / "parts").glob("*.parquet"))
    assert names == [f"part-0000{n}.parquet" for n in range(3)]
    settings = sampling(engine="scripted", count=None, shard=4)
    for _ in range(2):  # the second time, with an engine of its own
        with pytest.raises(EngineError, match="no line for"):
            rollout.run(tmp_path / "groups", settings, prompts=five.path, policy=policy)
        lines = (scratch_of(tmp_path / "groups") / "working" / "groups-00000.jsonl").read_text().splitlines()
        ids = five.table()["prompt_id"].to_pylist()
        assert [json.loads(line.partition(" ")[2])[0] for line in lines] == ids[:3]


LONG = {"engine": "vllm", "count": 1000, "shard": 400}
"""Sampling that takes vLLM some seconds: groups arrive over time, in three parts of more than is in flight."""


@pytest.fixture(scope="module")
def sampled_by_vllm(prompts, policy, sampling, room):
    """The digest of an uninterrupted sampling, in a process of its own."""
    words = rollout.command(room / "vllm-whole", sampling(**LONG), prompts=prompts.path, policy=policy.path)
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    return Artifact.open(room / "vllm-whole").manifest.digest


def test_a_vllm_that_was_killed_goes_on_where_it_was(sampled_by_vllm, prompts, policy, sampling, tmp_path):
    words = rollout.command(tmp_path / "out", sampling(**LONG), prompts=prompts.path, policy=policy.path)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        lines = 0
        while lines < 20:
            assert process.poll() is None
            time.sleep(0.002)
            found = list(tmp_path.glob(".part-out-*/working/groups-00001.jsonl"))
            lines = found[0].read_bytes().count(b"\n") if found else 0
        process.kill()
    assert process.returncode == -signal.SIGKILL
    scratch = scratch_of(tmp_path / "out")
    assert [path.name for path in scratch.glob("*.parquet")] == ["part-00000.parquet"]
    assert 20 <= (scratch / "working" / "groups-00001.jsonl").read_bytes().count(b"\n") < 400
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    assert Artifact.open(tmp_path / "out").manifest.digest == sampled_by_vllm


FAILING = """
    import sys
    from functools import partial
    from pathlib import Path

    from pipeline.engines import EngineOptions
    from pipeline.errors import EngineError
    from stages.rollout import Settings, rollout

    module, given = sys.modules["stages.rollout"], rollout.parser().parse_args(sys.argv[1:])
    timeout, errors = 0.1, 0
    while not given.out.exists():
        module.EngineOptions = partial(EngineOptions, timeout=timeout)
        try:
            rollout.run_arguments(given)
        except EngineError as error:
            assert "sampling took longer" in str(error), error
            (scratch,) = given.out.parent.glob(".part-*")
            kept = sum(path.read_bytes().count(b"\\n") for path in scratch.glob("working/groups-*"))
            kept += len(list(scratch.glob("*.parquet")))
            errors += 1
            timeout *= 1.4
            print(errors, kept, flush=True)
"""


def test_a_vllm_that_failed_is_built_anew_and_goes_on(sampled_by_vllm, prompts, policy, sampling, tmp_path):
    """Its time limit is too short, and longer with each try in the same process."""
    script = tmp_path / "failing.py"
    script.write_text(textwrap.dedent(FAILING))
    words = rollout.command(tmp_path / "out", sampling(**LONG), prompts=prompts.path, policy=policy.path)[3:]
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kept = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert kept
    assert max(kept) > 0
    assert Artifact.open(tmp_path / "out").manifest.digest == sampled_by_vllm


FOR_DEVICES = {"tensor_parallel": 2, "gpu_memory_utilization": 0.5, "max_num_seqs": 24}
DESK = ROOT / "flows" / "experiments" / "arithmetic.toml"


def test_what_an_experiment_says_of_devices_arrives_at_the_engine(prompts, policy, sampling, tmp_path):
    experiment = Experiment.load(DESK, [f"resources.{name}={value}" for name, value in FOR_DEVICES.items()])
    settings = Settings.of(experiment)
    assert {name: getattr(_options(settings, 100), name) for name in FOR_DEVICES} == FOR_DEVICES
    few = rollout.run(tmp_path / "few", sampling(max_num_seqs=24), prompts=prompts.path, policy=policy.path)
    assert few.manifest.settings["max_num_seqs"] == 24
    assert [options.max_num_seqs for _, options in engines._warm] == [24]


def test_what_an_engine_s_sleep_frees_is_measured(five, scripted, sampling, tmp_path, numbers, monkeypatch):
    """There is no accelerator here, and engines say nothing of one."""
    policy, settings = scripted({"*": ["1"]}), sampling(engine="scripted", group_size=1)
    without = rollout.run(tmp_path / "without", settings, prompts=five.path, policy=policy)
    monkeypatch.setattr(ScriptedEngine, "sleep", lambda engine: Memory(awake=71.25, asleep=3.5))
    made = rollout.run(tmp_path / "out", settings, prompts=five.path, policy=policy)
    assert made.manifest.digest == without.manifest.digest
    assert not {name for name, _ in numbers(without) if name.startswith("memory/")}
    assert numbers(made)["memory/engine_awake", 0] == 71.25
    assert numbers(made)["memory/engine_asleep", 0] == 3.5
    assert "engine asleep: 71.2 -> 3.5 GB" in (made.path / "log.txt").read_text()


def test_what_gates_look_at(five, scripted, sampling, tmp_path, numbers):
    """Responses by sample: all the same, two the same, cut at the limit; of greedy ones there is but one."""
    script = {"1+1=": ["1", "1", "1"], "1+2=": ["1", "2", "1"], "*": ["1" * 16, "3", "4"]}
    settings = sampling(engine="scripted", count=None, group_size=3, greedy=True)
    made = rollout.run(tmp_path / "out", settings, prompts=five.path, policy=scripted(script))
    assert made.stats["duplicates/in_group"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert made.stats["length/cut"] == pytest.approx(4 / 16)  # sample 0 and the greedy one of two prompts
    assert made.stats["rows/malformed"] == 0
    for name in ("duplicates/in_group", "length/cut", "rows/malformed"):
        assert numbers(made)[name, 0] == made.stats[name]
    alone = rollout.run(
        tmp_path / "alone", sampling(engine="scripted", group_size=1), prompts=five.path, policy=scripted(script, "two")
    )
    assert "duplicates/in_group" not in alone.stats


def test_repetition_by_hand():
    part = pa.table(
        {
            "prompt_id": [*"aaaa", *"bb", "c"], "sample": [-1, 0, 1, 2, 0, 1, 0],
            "response_tokens": pa.array([[1], [1], [1], [1, 1], [2], [2], [3]], pa.list_(pa.int32())),
        }
    )  # fmt: skip
    assert repeated(part) == [0.5, 1.0]
    assert repeated(part.slice(6)) == []


def test_a_tokenizer_of_another_model_is_refused_before_any_engine_is_built(policy, five, sampling, tmp_path):
    """Its tokens go beyond what the weights know: in the prompts, or among those that end a response."""
    characters = ["".join(map(chr, range(ord("!"), ord("A"))))]
    save(*create(ModelSpec(layers=1, width=32, heads=1, kv_heads=1), characters, seed=0), tmp_path / "other")
    mixed = shutil.copytree(policy.path, tmp_path / "mixed", ignore=shutil.ignore_patterns("manifest.json"))
    for path in (tmp_path / "other").iterdir():
        if "token" in path.name:
            shutil.copy(path, mixed)
    with pytest.raises(
        ArtifactError, match=r"tokenizer is another model's: it uses token id \d+, and the weights know"
    ) as e:
        rollout.run(tmp_path / "out", sampling(), prompts=five.path, policy=mixed)
    assert e.value.where == str(mixed)
    assert "copy the tokenizer's files" in e.value.do
    with pytest.raises(ArtifactError, match="token id 17, and the weights know 17 tokens"):
        refuse_foreign([[1, 16]], [1, 17], 17, mixed)
    refuse_foreign([[1, 16], []], [1], 17, mixed)


def test_an_engine_that_does_not_exist(sampling):
    with pytest.raises(ExperimentError, match="no engine is called 'vlm'"):
        sampling(engine="vlm")


def test_what_is_not_a_checkpoint_is_refused_before_any_engine_is_built(prompts, policy, sampling, tmp_path):
    """Engines raise `EngineError` for what they cannot load, or sample from it."""
    settings = sampling(engine="scripted")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        rollout.run(tmp_path / "out", settings, prompts=prompts.path, policy=tmp_path / "bare")
    with pytest.raises(ArtifactError, match="expected policy, found prompts"):
        rollout.run(tmp_path / "out", settings, prompts=prompts.path, policy=prompts.path)
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="the config does not say"):
        rollout.run(tmp_path / "out", settings, prompts=prompts.path, policy=tmp_path / "bare")

    sick = shutil.copytree(policy.path, tmp_path / "sick", ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(sick / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, sick / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight has 1 of 64 numbers not finite"):
        rollout.run(tmp_path / "out", settings, prompts=prompts.path, policy=sick)
    assert not (tmp_path / "out").exists()


def test_a_response_longer_than_the_policys_positions_is_refused_before_any_engine_is_built(
    prompts, policy, sampling, tmp_path
):
    with pytest.raises(ArtifactError, match="prompt_tokens \\+ response_tokens = 65 is more than the policy's 64"):
        rollout.run(tmp_path / "out", sampling(response_tokens=57), prompts=prompts.path, policy=policy.path)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_does_not_exist_is_told_with_the_settings(sampling):
    with pytest.raises(ExperimentError, match="there are: vllm, transformers, scripted"):
        sampling(engine="vlm")
