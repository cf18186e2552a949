"""Errors: three parts, an exit code, and the same after a pickle."""

import pickle

import pytest

from pipeline import errors
from pipeline.errors import ArtifactError, ContractError, EngineError, ExperimentError, PipelineError, RecipeError


def tree(kind=PipelineError):
    return [kind, *(found for child in kind.__subclasses__() for found in tree(child))]


OURS = [kind for kind in tree() if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", OURS)
def test_an_error_survives_a_pickle(kind):
    error = pickle.loads(pickle.dumps(kind("found 3", "rows 1, 2", "look")))
    assert (type(error), error.what, error.where, error.do) == (kind, "found 3", "rows 1, 2", "look")
    assert str(error) == str(kind("found 3", "rows 1, 2", "look"))


def test_a_message_has_only_the_parts_that_are_given():
    assert str(PipelineError("bad")) == "bad"
    assert str(PipelineError("bad", "here", "stop")).splitlines() == ["bad", "  where: here", "  next:  stop"]
    assert str(PipelineError("bad", do="stop")).splitlines() == ["bad", "  next:  stop"]


def test_wrong_requests_exit_with_2_and_failures_with_1():
    assert {kind.exit_code for kind in (ExperimentError, RecipeError, ContractError, ArtifactError)} == {2}
    assert {kind.exit_code for kind in (PipelineError, EngineError, errors.NumericsError)} == {1}


def test_the_module_draws_its_whole_tree():
    assert all(kind.__name__ in errors.__doc__ for kind in OURS)
