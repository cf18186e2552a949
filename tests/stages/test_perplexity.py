import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.contracts import DOCUMENTS
from pipeline.errors import ArtifactError, NumericsError
from pipeline.models import checkpoint
from pipeline.text import Chat
from stages.perplexity import Predicted, Settings, perplexity

TEXTS = ["1+2=3;3", "4,5,6,6,6,5,4,3,2,1,2,3,4,5,6", "6"]


@pytest.fixture(scope="module")
def documents(by_hand):
    return by_hand(DOCUMENTS, [{"document_id": f"{n}", "text": text, "source": "hand"} for n, text in enumerate(TEXTS)])


def settings(**changes):
    return Settings.of(None, {"document_tokens": 32, **changes})


def rows_of(artifact):
    return {row["document_id"]: row for row in artifact.table().to_pylist()}


def test_it_is_the_cross_entropy_of_transformers(documents, policy, tmp_path, sound, numbers):
    made = perplexity.run(tmp_path / "out", settings(), documents=documents.path, policy=policy.path)
    sound(made)
    rows, model, chat = rows_of(made), AutoModelForCausalLM.from_pretrained(policy.path), Chat(policy.path)
    for number, text in enumerate(TEXTS):
        (tokens,) = chat.document_tokens(text, 1000)
        ids = torch.tensor([tokens])
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=ids).loss) * (len(tokens) - 1)
        assert rows[str(number)]["tokens"] == len(tokens) - 1
        assert rows[str(number)]["nll"] == pytest.approx(expected, rel=1e-5)
    nll, tokens = (sum(row[name] for row in rows.values()) for name in ("nll", "tokens"))
    assert made.stats["loss/documents"] == pytest.approx(nll / tokens)
    assert numbers(made)["perplexity", 0] == pytest.approx(np.exp(nll / tokens))


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_micro_batches_change_nothing(documents, policy, tmp_path, budget):
    read = {"documents": documents.path, "policy": policy.path}
    whole = perplexity.run(tmp_path / "whole", settings(), **read)
    cut = perplexity.run(tmp_path / "cut", settings(micro_batch_tokens=budget), **read)
    assert [row["document_id"] for row in cut.table().to_pylist()] == ["0", "1", "2"]
    for name, row in rows_of(cut).items():
        assert row["nll"] == pytest.approx(rows_of(whole)[name]["nll"], rel=1e-5)


def test_a_long_document_is_read_in_windows(documents, policy, tmp_path):
    made = perplexity.run(tmp_path / "out", settings(document_tokens=8), documents=documents.path, policy=policy.path)
    chat = Chat(policy.path)
    windows = chat.document_tokens(TEXTS[1], 8)
    assert len(windows) == 4
    assert rows_of(made)["1"]["tokens"] == sum(len(window) - 1 for window in windows)


def test_a_document_without_a_token_to_predict_is_counted(by_hand, policy, tmp_path, monkeypatch):
    rows = [{"document_id": name, "text": text, "source": "hand"} for name, text in (("a", "1+1"), ("b", "1"))]
    documents = by_hand(DOCUMENTS, rows)
    short = Chat.document_tokens
    monkeypatch.setattr(
        Chat, "document_tokens", lambda chat, text, limit: [] if text == "1" else short(chat, text, limit)
    )
    made = perplexity.run(tmp_path / "out", settings(), documents=documents.path, policy=policy.path)
    assert (made.stats["rejected"], list(rows_of(made))) == (1, ["a"])


def test_its_standard_error_is_that_of_many_draws():
    rng = np.random.default_rng(0)

    def draw(count):
        tokens = rng.integers(5, 40, count)
        return Predicted([str(n) for n in range(count)], tokens, tokens * rng.gamma(4.0, 0.3, count))

    losses = [draw(60).loss for _ in range(2000)]
    assert draw(60).error == pytest.approx(np.std(losses), rel=0.35)
    assert np.isnan(draw(1).error)


def test_a_broken_policy_and_another_kind_of_directory_are_refused(documents, policy, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(policy.path)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    checkpoint.save(broken, Chat(policy.path).tokenizer, tmp_path / "broken")
    with pytest.raises((NumericsError, ArtifactError), match=r"finite|nan"):
        perplexity.run(tmp_path / "out", settings(), documents=documents.path, policy=tmp_path / "broken")
    with pytest.raises(ArtifactError):
        perplexity.run(tmp_path / "out", settings(), documents=documents.path, policy=documents.path)
    with pytest.raises(ArtifactError, match="expected documents, found policy"):
        perplexity.run(tmp_path / "out", settings(), documents=policy.path, policy=policy.path)
