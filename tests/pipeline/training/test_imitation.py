"""Imitation: the mean over a step's imitated tokens, of demonstrations and documents alike."""

import numpy as np
import pytest
import torch

from pipeline.errors import ContractError
from pipeline.models.checkpoint import save
from pipeline.models.fresh import ModelSpec, create
from pipeline.text import Chat
from pipeline.training.imitation import Example, Imitation, windows

EXAMPLES = [
    Example("a reply", [3, 4], [5, 6, 1], [True, True, True]),
    Example("two replies", [7], [4, 3, 6, 5, 1], [True, False, False, True, True]),
    Example("a document", [5], [6, 7, 8, 3], [True] * 4),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    place = tmp_path_factory.mktemp("imitation") / "policy"
    model, tokenizer = create(ModelSpec(layers=1, width=32, heads=1, kv_heads=1, init_std=0.3), ["abcdef"], 0)
    save(model, tokenizer, place)
    return model, Chat(place)


def nll(model, example):
    """Of each imitated token, one forward pass per example, no padding."""
    tokens = torch.tensor([*example.prompt, *example.targets])
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    logprobs = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return -logprobs[len(example.prompt) - 1 :][torch.tensor(example.mask)]


@pytest.mark.parametrize("parts", [[[0, 1, 2]], [[2], [0, 1]], [[1], [0], [2]]])
def test_the_loss_is_the_mean_over_the_imitated_tokens_of_the_step(small, parts):
    model, objective = small[0], Imitation(EXAMPLES)
    step = objective.step(np.arange(3))
    with torch.no_grad():
        shares = [objective.losses(model, np.array(part), step) for part in parts]
    wanted = torch.cat([nll(model, example) for example in EXAMPLES]).mean()
    assert float(sum(share.total for share in shares)) == pytest.approx(float(wanted), rel=1e-5)
    assert sum(share.parts["loss/nll"] for share in shares) == pytest.approx(float(wanted), rel=1e-5)


def test_a_row_drawn_twice_counts_twice(small):
    model, objective, rows = small[0], Imitation(EXAMPLES), np.array([0, 2, 0])
    wanted = torch.cat([nll(model, EXAMPLES[row]) for row in rows]).mean()
    found = objective.losses(model, rows, objective.step(rows))
    assert float(found.total.detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_lengths_count_all_tokens_and_rows_have_names():
    objective = Imitation(EXAMPLES)
    assert objective.lengths.tolist() == [5, 6, 5]
    assert objective.names(np.array([2, 0])) == ["a document", "a reply"]


def test_all_tokens_of_a_window_but_the_first_are_imitated(small):
    chat = small[1]
    made = windows([{"document_id": "d1", "text": "abcde"}, {"document_id": "d2", "text": "f"}], chat, 3)
    ids = {character: chat.tokenizer.convert_tokens_to_ids(character) for character in "abcdef"}
    end = chat.tokenizer.eos_token_id
    assert made == [
        Example("document d1", [ids["a"]], [ids["b"], ids["c"]], [True, True]),
        Example("document d1", [ids["d"]], [ids["e"], end], [True, True]),
        Example("document d2", [ids["f"]], [end], [True]),
    ]


def test_documents_without_two_tokens_are_refused(small):
    with pytest.raises(ContractError, match="no document has two tokens"):
        windows([{"document_id": "d1", "text": "abcde"}], small[1], 1)
