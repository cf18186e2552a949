"""A response is cut at its tokens, and every token keeps its numbers."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.artifacts import InputRecord, Outbox
from pipeline.contracts import ADVANTAGES, LABELS, ROLLOUTS, SCORES
from pipeline.errors import ArtifactError
from pipeline.inspecting import tokens
from pipeline.inspecting.tokens import Cutter, colour, printable, read, rollouts_of, span

TEXTS = ["7+5=12, 12+8=20", "größer als 3, ja! 😀 漢字", " leading and  double spaces\n\ttab"]


def byte_level(folder):
    """A tokenizer whose tokens are bytes and a few merges: one character may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def metaspace(folder):
    """A tokenizer of SentencePiece's kind: its decoder drops the first space."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁two", -2.0), ("▁and", -2.0), ("x", -3.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    return byte_level(folder), Cutter(folder / "tokenizer.json")


@given(text=st.text(max_size=40))
def test_the_pieces_joined_are_the_text(bytewise, text):
    tokenizer, cutter = bytewise
    ids = tokenizer.encode(text).ids
    pieces = cutter.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_stands_at_the_last_of_them(bytewise):
    tokenizer, cutter = bytewise
    ids = tokenizer.encode("a☃b").ids
    assert len(ids) == 5
    assert cutter.pieces(ids) == ["a", "", "", "☃", "b"]


def test_a_response_cut_inside_a_character_ends_with_a_replacement(bytewise):
    tokenizer, cutter = bytewise
    ids = tokenizer.encode("a☃").ids[:-1]
    assert "".join(cutter.pieces(ids)) == "a�"


def test_a_decoder_that_drops_the_first_space_loses_none_in_the_middle(tmp_path):
    tokenizer = metaspace(tmp_path)
    ids = tokenizer.encode("two and two").ids
    assert Cutter(tmp_path / "tokenizer.json").pieces(ids) == ["two", " and", " two"]


# one iteration, planted


def write(folder, name, contract, rows, inputs=None):
    outbox = Outbox(folder / name, contract, "planted", 1, f"{name:0<64}", {}, inputs or {})
    outbox.write(0, pa.Table.from_pylist(rows, schema=contract.schema(rows[0])))
    return outbox.commit()


def rollout_row(tokenizer, prompt, sample, text, logprob=-0.5):
    ids = [*tokenizer.encode(text).ids, 0]
    return {
        "prompt_id": prompt, "sample": sample, "prompt_tokens": tokenizer.encode("2+2=").ids, "response_tokens": ids,
        "response": text, "sampler_logprobs": [logprob] * len(ids), "finish": "stop", "seed": 1,
    }  # fmt: skip


def label_row(prompt, sample, reward):
    return {
        "prompt_id": prompt, "sample": sample, "reward": reward, "correct": reward > 0, "gold": None,
        "extracted": "4", "target": "4", "verdict": "correct" if reward > 0 else "wrong", "vote_share": None,
        "keep": reward > 0, "dropped": None if reward > 0 else "constant outcomes",
    }  # fmt: skip


@pytest.fixture
def iteration(tmp_path):
    """RUN/0001 with two responses to one prompt, of which one trains."""
    run = tmp_path / "run"
    tokenizer = byte_level(run / "0000" / "policy")
    here = run / "0001"
    policy = InputRecord(path="elsewhere/run/0000/policy", fingerprint="0" * 64, digest="0" * 64)
    rows = [rollout_row(tokenizer, "p", 0, "4"), rollout_row(tokenizer, "p", 1, "☃!")]
    rollouts = write(here, "rollouts-0", ROLLOUTS, rows, {"policy": [policy]})
    made_of = {"rollouts": [rollouts.record()]}
    write(here, "labels-0", LABELS, [label_row("p", 0, 1.0), label_row("p", 1, 0.0)], made_of)
    write(here, "candidates", ROLLOUTS, [rollout_row(tokenizer, "p", 0, "5")], {"policy": [policy]})
    length = len(rows[0]["response_tokens"])
    scores = {
        "prompt_id": "p", "sample": 0, "old_logprobs": [-0.75] * length, "ref_logprobs": [-1.0] * length,
        "values": [0.25] * length,
    }  # fmt: skip
    write(here, "scores", SCORES, [scores], made_of)
    credit = {
        "prompt_id": "p", "sample": 0, "prompt_tokens": rows[0]["prompt_tokens"],
        "response_tokens": rows[0]["response_tokens"], "advantages": [1.5] * length, "returns": [1.0] * length,
        "old_logprobs": [-0.75] * length, "ref_logprobs": [-1.0] * length, "values": [0.25] * length, "reward": 1.0,
        "shaped_reward": 1.0, "correct": True, "finished": True,
    }  # fmt: skip
    write(here, "advantages", ADVANTAGES, [credit], made_of)
    return here


def test_a_token_has_the_numbers_of_everything_that_lies_beside_it(iteration):
    trained, dropped = read(iteration / "rollouts-0")
    assert (trained.prompt, trained.pieces) == ("2+2=", ("4", "<eos>"))
    assert dict(trained.columns) == {
        "advantages": (1.5, 1.5), "values": (0.25, 0.25), "returns": (1.0, 1.0), "kl": (0.25, 0.25),
        "mismatch": (0.25, 0.25), "logprobs": (-0.5, -0.5),
    }  # fmt: skip
    assert trained.facts["verdict"] == "correct"
    assert trained.facts["finish"] == "stop"
    assert dropped.columns.keys() == {"logprobs"}
    assert dropped.facts["dropped"] == "constant outcomes"


def test_candidates_of_the_same_iteration_have_numbers_of_their_own(iteration):
    (one,) = read(iteration / "candidates")
    assert one.pieces[0] == "5" and one.columns.keys() == {"logprobs"} and "reward" not in one.facts


def test_responses_come_in_the_order_of_the_keys(iteration):
    assert [one.sample for one in read(iteration / "rollouts-0", [("p", 1), ("p", 0)])] == [1, 0]


def test_at_most_so_many_are_read(iteration):
    assert [one.sample for one in read(iteration / "rollouts-0", limit=1)] == [0]


def test_a_key_that_is_not_there_is_named(iteration):
    with pytest.raises(ArtifactError, match=r"\('p', 7\)"):
        read(iteration / "rollouts-0", [("p", 7)])


def test_a_redone_artifact_speaks_where_it_is_asked_for(iteration):
    redone = write(iteration, "labels-0.harsh", LABELS, [label_row("p", 0, -3.0), label_row("p", 1, -3.0)])
    assert read(iteration / "rollouts-0")[0].facts["reward"] == 1.0
    assert read(iteration / "rollouts-0", redone=redone.path)[0].facts["reward"] == -3.0


def test_a_tokenizer_that_is_gone_is_named(iteration):
    (iteration.parent / "0000" / "policy" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="tokenizer of these responses is gone"):
        read(iteration / "rollouts-0")


def test_scores_and_advantages_know_their_rollouts(iteration):
    assert rollouts_of(iteration / "advantages") == [(iteration / "rollouts-0").resolve()]
    assert rollouts_of(iteration / "rollouts-0") == [iteration / "rollouts-0"]


# the scale


def reading(**columns):
    return tokens.Reading("p", 0, "", ("a", "b"), {}, columns)


def test_a_signed_scale_is_symmetric_and_an_unsigned_one_ends_at_zero():
    several = [reading(advantages=(-0.5, 0.1)), reading(advantages=(2.0, float("nan")), logprobs=(-3.0, -0.1))]
    assert span("advantages", several) == (-2.0, 2.0)
    assert span("logprobs", several) == (-3.0, 0.0)
    assert span("values", several) == (0.0, 0.0)


def test_colours_are_white_at_zero_and_full_at_the_ends():
    assert colour(0.0, -2, 2) == (255, 255, 255)
    assert colour(2.0, -2, 2) == tokens.POSITIVE
    assert colour(-2.0, -2, 2) == tokens.NEGATIVE
    assert colour(-9.0, -2, 2) == tokens.NEGATIVE
    assert colour(float("nan"), -2, 2) == colour(1.0, 0, 0) == (255, 255, 255)


def test_nothing_that_a_model_writes_controls_a_terminal():
    assert printable("a\x1b[31mb\n\u202e") == "a\\u001b[31mb↵\\u202e"
