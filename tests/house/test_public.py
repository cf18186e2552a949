"""Everything that others may use says what it is."""

import inspect
import pkgutil
from dataclasses import is_dataclass
from importlib import import_module

import pytest
from pydantic import BaseModel

import flows
import pipeline
import stages
from pipeline.contracts import CONTRACTS
from pipeline.stage import Stage

MODULES = sorted(
    found.name
    for room in (pipeline, stages, flows)
    for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")
    if found.name != "pipeline.engines.vllm"  # imports vllm; ruff's D1 holds it to the same rule
)


def public(module):
    """(dotted name, object) of every public function and class of a module, and of the methods of its classes."""
    for name, value in vars(module).items():
        found = value.function if isinstance(value, Stage) else value
        if name.startswith("_") or not (inspect.isfunction(found) or inspect.isclass(found)):
            continue
        if found.__module__ != module.__name__:
            continue
        yield f"{module.__name__}.{name}", found
        if inspect.isclass(found):
            yield from methods(f"{module.__name__}.{name}", found)


def methods(place, owner):
    for name, found in vars(owner).items():
        function = getattr(found, "__func__", getattr(found, "fget", getattr(found, "func", found)))
        if name.startswith("_") or not inspect.isfunction(function) or "<locals>" in function.__qualname__:
            continue
        yield f"{place}.{name}", function


def own_doc(found):
    """The docstring as written: a dataclass makes one up of its fields."""
    doc = found.__doc__ or ""
    return "" if is_dataclass(found) and doc.startswith(f"{found.__name__}(") else doc


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    module = import_module(name)
    assert module.__doc__, name
    assert not [place for place, found in public(module) if not own_doc(found).strip()]


SETTINGS = [
    pytest.param(found, id=place)
    for name in MODULES
    for place, found in public(import_module(name))
    if inspect.isclass(found) and issubclass(found, BaseModel)
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_field_of_settings_is_described(settings):
    own = {name: info for name, info in settings.model_fields.items() if name in settings.__annotations__}
    assert not [name for name, info in own.items() if not (info.description or "").strip()]


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=lambda contract: contract.name)
def test_every_field_of_a_contract_has_a_doc(contract):
    assert contract.doc
    assert not [field.name for field in contract.fields if not field.doc.strip()]
    for field in contract.schema():
        assert field.metadata.keys() == {b"doc", b"unit"}
