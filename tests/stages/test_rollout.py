import json
import shutil
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.contracts import PROMPTS
from pipeline.engines import Completion, Sampling
from pipeline.errors import ArtifactError, ContractError, EngineError, ExperimentError
from pipeline.models.checkpoint import load_policy
from pipeline.models.forward import response_logprobs
from pipeline.sources.rows import identity
from pipeline.text import Chat
from stages.rollout import Asked, occurrences, questions, rollout, sampled, short_enough, stream, tokenized

SIZES = st.integers(1, 12)


@pytest.fixture
def scripted(policy, tmp_path):
    """The session's policy with a script: prompt text -> responses, as texts without the end token."""

    def write(script):
        place = shutil.copytree(policy.path, tmp_path / "scripted", ignore=shutil.ignore_patterns("manifest.json"))
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


def test_the_order_of_completions_does_not_matter_and_a_missing_one_does(policy):
    asked, plan = [Asked("a", [4], 0), Asked("b", [5], 0)], Sampling(group_size=2, max_tokens=4, stop_ids=(1,))
    said = [Completion(prompt, s, [6 + prompt, 4 + s, 1], [-1.0] * 3, "stop", s) for prompt in (0, 1) for s in (0, 1)]
    chat = Chat(policy.path)
    table = sampled(asked, iter(said), plan, chat)
    assert table.equals(sampled(asked, iter(said[::-1]), plan, chat))
    assert table["response_tokens"].to_pylist() == [completion.tokens for completion in said]
    with pytest.raises(EngineError, match="1 of 2 responses") as error:
        sampled(asked, iter(said[:3]), plan, chat)
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


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_resumed_sampling_equals_an_uninterrupted_one(rollouts, prompts, policy, sampling, tmp_path, lost):
    scratch = tmp_path / f".part-rollouts-{rollouts.manifest.fingerprint[:8]}"
    scratch.mkdir()
    for index, part in enumerate(rollouts.part_paths()):
        if index != lost:
            shutil.copy2(part, scratch)
    kept = {path.name: path.stat().st_ino for path in scratch.iterdir()}
    resumed = rollout.run(tmp_path / "rollouts", sampling(), prompts=prompts.path, policy=policy.path)
    assert resumed.manifest.digest == rollouts.manifest.digest
    assert {name: (resumed.path / name).stat().st_ino for name in kept} == kept
    assert resumed.stats["tokens"] == rollouts.stats["tokens"]


def test_a_crash_before_the_commit_samples_nothing_again(rollouts, prompts, policy, sampling, tmp_path, numbers):
    scratch = tmp_path / f".part-rollouts-{rollouts.manifest.fingerprint[:8]}"
    scratch.mkdir()
    for part in rollouts.part_paths():
        shutil.copy2(part, scratch)
    resumed = rollout.run(tmp_path / "rollouts", sampling(), prompts=prompts.path, policy=policy.path)
    assert resumed.manifest.digest == rollouts.manifest.digest
    assert ("speed/tokens_per_second", 0) not in numbers(resumed)
    assert numbers(resumed)["length/mean", 0] == numbers(rollouts)["length/mean", 0]


def test_what_was_finished_before_the_engine_failed_is_kept(five, scripted, sampling, tmp_path):
    policy = scripted({text: ["1"] for text in ("1+1=", "1+2=", "2+2=")})
    settings = sampling(engine="scripted", count=None, shard=1)
    with pytest.raises(EngineError, match="no line for"):
        rollout.run(tmp_path / "out", settings, prompts=five.path, policy=policy)
    assert not (tmp_path / "out").exists()
    (scratch,) = (path for path in tmp_path.iterdir() if path.name.startswith(".part-out"))
    assert sorted(path.name for path in scratch.glob("*.parquet")) == [f"part-0000{n}.parquet" for n in range(3)]


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
