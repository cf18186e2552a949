"""Algorithms are data: no line of Python in a stage or a flow knows one by name, and columns are known by theirs."""

import ast
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.algorithms.bind import SHELVES
from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.shelf import FROM_MODELS, OFFERED, Line, Shelf
from pipeline.algorithms.weights import WEIGHTS
from pipeline.contracts import ROLLOUTS, SCORES
from pipeline.grading import Judgement
from pipeline.models.fresh import ModelSpec, create
from stages import advantage, label, score, update

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
    assert set(score.MODEL_OF) <= set(FROM_MODELS)
    assert {name: FROM_MODELS[name] for name in score.MODEL_OF} == score.MODEL_OF


def piece_that_reads(shelf, returns):
    """A piece of that shelf whose parameters are all columns on offer."""
    names = ", ".join(OFFERED[shelf])
    scope = {"result": returns}
    exec(f"def everything({names}): return result({OFFERED[shelf][0]})", scope)
    return Shelf(shelf, [scope["everything"]]).take(Line(kind="everything"))


def rollouts_and_more():
    """Two responses with every column that `advantage` joins, and some that `update` reads."""
    keys = {"prompt_id": ["a", "a"], "sample": [-1, 0]}
    tokens = pa.array([[1, 2], [3]], pa.list_(pa.int32()))
    floats = pa.array([[-1.0, -2.0], [-3.0]], pa.list_(pa.float32()))
    rest = dict.fromkeys(
        ("old_logprobs", "ref_logprobs", "values", "sampler_logprobs", "advantages", "returns"), floats
    )
    return pa.table(
        {
            **keys, "prompt_tokens": tokens, "response_tokens": tokens, "response": ["x", "y"],
            "finish": ["stop", "length"], "seed": [0, 0], "reward": pa.array([1.0, 0.0], pa.float32()),
            "correct": [True, False], **rest,
        }
    )  # fmt: skip


def test_label_hands_over_every_column_on_offer():
    part = rollouts_and_more().select([field.name for field in ROLLOUTS.fields])
    columns = label.columns_of(part, [Judgement(True, "x", "correct"), Judgement(None, None, "timeout")])
    later = {"rewards", "reward_scores"}  # of the labeler itself, and of the reward model where there are judgements
    assert set(OFFERED["label"]) <= set(columns) | {"reward_scores"}
    assert set(OFFERED["filter"]) <= set(columns) | {"rewards"}
    assigned = {
        node.slice.value
        for node in ast.walk(ast.parse(Path(label.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant)
        and isinstance(node.value, ast.Name) and node.value.id == "columns"
    }  # fmt: skip
    assert later <= assigned


def test_advantage_hands_over_every_column_on_offer():
    columns = advantage.columns_of(rollouts_and_more())
    credit, shaped = advantage.credited(
        columns,
        [piece_that_reads("shape", np.asarray)],
        piece_that_reads("advantage", advantage.Credit),
        piece_that_reads("normalize", np.asarray),
    )
    np.testing.assert_array_equal(shaped, [[0, 1], [0, 0]])
    np.testing.assert_array_equal(credit.advantages, shaped)


def test_update_hands_over_every_column_on_offer():
    model, _ = create(ModelSpec(layers=1, width=32, heads=1, kv_heads=1), ["abc"], 0)
    term = update.Term(piece_that_reads("loss", torch.Tensor.neg), 1.0, correct_only=False)
    wanted = update.Improvement(rollouts_and_more(), [term], WEIGHTS["token_mean"], 1.0)
    rows = np.arange(2)
    assert float(wanted.losses(model, rows, wanted.step(rows)).total.detach()) > 0
