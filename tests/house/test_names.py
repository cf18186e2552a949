"""Algorithms are data: no line of Python in a stage or a flow knows one by name, and columns are known by theirs."""

import ast
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.algorithms.bind import SHELVES
from pipeline.algorithms.filters import Kept
from pipeline.algorithms.labels import Labels
from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.shelf import FROM_MODELS, OFFERED, Line, Shelf
from pipeline.algorithms.weights import WEIGHTS
from pipeline.contracts import ROLLOUTS, SCORES
from pipeline.grading.mixed import Means
from pipeline.models.checkpoint import fresh_critic, save
from pipeline.models.fresh import ModelSpec, create
from stages import advantage, label, score, update
from stages import value as value_stage

ROOT = Path(__file__).parents[2]
ALGORITHMS = {
    "instructgpt", "ppo", "grpo", "rloo", "remax", "reinforce_pp", "reinforce_pp_baseline", "dapo", "vc_ppo", "vapo",
    "ttrl", "rlsc",
}  # fmt: skip
FILES = sorted(
    path for pattern in ("stages/*.py", "flows/*.py", "pipeline/training/**/*.py", "pipeline/engines/**/*.py")
    for path in ROOT.glob(pattern)
)  # fmt: skip


def code_words(source):
    """Every name and every text in the code; comments are not in the tree, texts that stand alone are documentation."""
    tree = ast.parse(source)
    alone = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    told = {id(value) for value in alone if isinstance(value, ast.Constant)}
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            if id(node) not in told:
                yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str))


def algorithms_in(text):
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text).lower()
    return {name for name in ALGORITHMS if re.search(rf"(?<![a-z]){name}(?![a-z])", words)}


def test_the_list_of_algorithms_is_not_behind():
    assert set(Recipe.names()) <= ALGORITHMS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_knows_an_algorithm_by_name(path):
    found = {word: algorithms_in(word) for word in code_words(path.read_text(encoding="utf-8"))}
    assert not {word: names for word, names in found.items() if names}


@pytest.mark.parametrize(
    "line",
    ['if recipe.name == "grpo": pass', "from x import dapo", "def ppo_step(): pass", "class GrpoTrainer: pass",
     "f(use_rloo=True)", 'help = f"as in {x} GRPO"', "x.dapo", "def f(vapo): pass", "import a as ttrl"],
)  # fmt: skip
def test_a_name_in_code_would_be_found(line):
    assert any(algorithms_in(word) for word in code_words(line))


@pytest.mark.parametrize(
    "line", ['"""As in GRPO."""', "x = 1  # DAPO does this", 'x = 1\n"""PPO calls it y."""', "opposed = 1"]
)
def test_documentation_may_name_one(line):
    assert not any(algorithms_in(word) for word in code_words(line))


@pytest.mark.parametrize("shelf", SHELVES.values(), ids=lambda shelf: shelf.name)
def test_every_parameter_of_a_piece_is_an_offered_column(shelf):
    assert len(shelf.names) > 0
    for card in shelf:
        assert set(card.needs) <= set(OFFERED[shelf.name]), card.name


def test_columns_from_models_are_columns_of_scores():
    assert set(FROM_MODELS) <= {field.name for field in SCORES.fields}
    assert {name: model.replace("_", " ") for name, model in score.MODEL_OF.items()} == FROM_MODELS


def piece_that_reads(shelf, returns, names=None):
    """A piece of that shelf whose parameters are all columns on offer, or those named."""
    names = OFFERED[shelf] if names is None else names
    scope = {"result": returns}
    exec(f"def everything({', '.join(names)}): return result({names[0]})", scope)
    return Shelf(shelf, [scope["everything"]]).take(Line(kind="everything"))


def rollouts_and_more():
    """Two responses with every column that `advantage` joins, and those that `update` and `value` read."""
    keys = {"prompt_id": ["a", "a"], "sample": [0, 1]}
    tokens = pa.array([[1, 2], [3]], pa.list_(pa.int32()))
    floats = pa.array([[-1.0, -2.0], [-3.0]], pa.list_(pa.float32()))
    rest = dict.fromkeys(
        ("old_logprobs", "ref_logprobs", "values", "sampler_logprobs", "advantages", "returns"), floats
    )
    return pa.table(
        {
            **keys, "prompt_tokens": tokens, "response_tokens": tokens, "response": ["1", "2"],
            "finish": ["stop", "length"], "finished": [True, False], "seed": [0, 0],
            "reward": pa.array([1.0, 0.0], pa.float32()), "greedy": pa.array([0.5, 0.5], pa.float32()),
            "correct": [True, False], **rest,
        }
    )  # fmt: skip


def test_label_hands_over_every_column_on_offer():
    part = rollouts_and_more().select([field.name for field in ROLLOUTS.fields if not field.optional])
    made = label.judged(
        part,
        [{"answer": "1", "grader": "exact"}] * 2,
        piece_that_reads("label", lambda verdicts: Labels(verdicts.astype(np.float32), verdicts)),
        [piece_that_reads("filter", lambda rewards: Kept(rewards > 0, "by hand"))],
        label.Settings(label=Line(kind="everything")),
        Means(1.0, 1),
        np.zeros(2, np.float32),
    )
    assert made.labels.rewards.tolist() == [1, 0]
    assert made.reasons == [None, "by hand"]


def test_advantage_hands_over_every_column_on_offer():
    columns = advantage.columns_of(rollouts_and_more())
    made = advantage.credited(
        columns,
        advantage.Pieces(
            [piece_that_reads("shape", np.asarray)],
            piece_that_reads("advantage", advantage.Credit),
            piece_that_reads("normalize", np.asarray),
            piece_that_reads("importance", np.negative),
        ),
    )
    np.testing.assert_array_equal(made.shaped, [[0, 1], [0, 0]])
    np.testing.assert_array_equal(made.credit.advantages, [[0, 2], [0, 0]])


OF_THE_CRITIC = ("values", "old_values", "returns")


def test_update_and_value_hand_over_every_column_on_offer(tmp_path):
    model, tokenizer = create(ModelSpec(layers=1, width=32, heads=1, kv_heads=1), ["abc"], 0)
    rows, table = np.arange(2), rollouts_and_more()
    read = [name for name in OFFERED["loss"] if name not in OF_THE_CRITIC]
    term = update.Term(piece_that_reads("loss", torch.Tensor.neg, read), 1.0, on="all")
    wanted = update.Improvement(table, [term], WEIGHTS["token_mean"], 1.0)
    assert float(wanted.losses(model, rows, wanted.step(rows)).total.detach()) > 0
    save(model, tokenizer, tmp_path / "policy")
    critic = fresh_critic(tmp_path / "policy", 0)
    taught = value_stage.Regression(table, piece_that_reads("loss", torch.Tensor.square, (*OF_THE_CRITIC, "mask")))
    assert float(taught.losses(critic, rows, taught.step(rows)).total.detach()) > 0
