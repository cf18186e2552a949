"""What the tests of stages and launchers share: a small experiment, and a package with a real stage in it."""

import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import DOCUMENTS

EXPERIMENT = """
recipe = "dapo"

[recipe_changes.dapo]
rollout = { group_size = 4, rounds = 2 }
shape   = [{ kind = "overlong_penalty", limit = 32, buffer = 8 }]
update  = { minibatches = 3 }
normalize = false

[recipe_changes.grpo]
rollout = { group_size = 5 }
update  = { minibatches = 1 }

[models.new]
layers = 1
width  = 32

[data.world]
terms = [2, 3]

[data.demonstrations]
source = "arithmetic"
count  = 10

[data.prompts]
source  = "files"
files   = ["a b.jsonl", "c.csv"]
columns = { answer = "a.b", prompt = 'say "it"' }

[scale]
iterations      = 2
groups          = 3
prompt_tokens   = 16
response_tokens = 32
learning_rate   = 2e-4
"""

TOY = '''
"""documents -> documents: the toy."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa

from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import DOCUMENTS, PROMPTS
from pipeline.errors import EngineError, InputError
from pipeline.settings import Settings as Base
from pipeline.stage import FILES, StageSettings, stage


class Shape(Base):
    """A nested setting."""

    width: int = 2
    height: int | None = 5
    names: dict[str, str] = {}


class Settings(StageSettings):
    """What to write."""

    text: str = "hello"
    """What every document says."""
    shards: int = 3
    """How many parts."""
    limit: int | None = 7
    """A number that may be absent."""
    tags: tuple[str, ...] = ()
    """Words."""
    share: float = 1e-6
    """A small number."""
    loud: bool = False
    """Yes or no."""
    shape: Shape = Shape()
    """A table."""
    shapes: tuple[Shape, ...] = ()
    """Tables."""
    part: Literal["a", "b"] | None = None
    """Which side of the experiment."""

    @classmethod
    def slice(cls, experiment, changes):
        if changes.get("part") is None:
            raise InputError("which part?")
        return {"limit": experiment.scale.groups, "part": changes["part"], "shards": 2, "shape": Shape(width=9)}


@dataclass(frozen=True)
class Inputs:
    """What it reads."""

    documents: Annotated[Artifact, DOCUMENTS]
    more_documents: Annotated[tuple[Artifact, ...] | None, DOCUMENTS] = None
    files: Annotated[tuple[Path, ...], FILES] | None = None


def note(name: str, text: str) -> None:
    """Tell the test."""
    with (Path(os.environ["TOY_DIARY"]) / name).open("a") as stream:
        stream.write(f"{text}\\n")


@stage(writes=DOCUMENTS, version=3)
def toy(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Say the same thing over and over.

    Longer words about it, 100% of them.
    """
    note("runs", "run")
    mood = os.environ.get("TOY_MOOD", "")
    if mood == "request":
        raise InputError("nothing suits me", "here", "change something")
    for index in out.shards(settings.shards):
        if mood == "failure" and index == 2:
            raise EngineError("tired")
        if mood == "sleepy":
            sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
            note("sleepers", str(os.getpid()))
            note("sleepers", str(sleeper.pid))
            time.sleep(120)
        note("shards", str(index))
        rows = inputs.documents.table().to_pylist()
        rows = [{**row, "document_id": f"{row['document_id']}-{index}", "text": settings.text} for row in rows]
        if mood == "careless":
            rows = []
        out.write(index, pa.Table.from_pylist(rows, schema=DOCUMENTS.schema()))
    out.stats["read"] = len(inputs.more_documents or ()) + len(inputs.files or ())


if __name__ == "__main__":
    toy.main()
'''


@pytest.fixture
def experiment_file(tmp_path):
    path = tmp_path / "an experiment" / "small.toml"
    path.parent.mkdir()
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def toy_package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    (folder / "toy_stages").mkdir()
    (folder / "toy_stages" / "__init__.py").touch()
    (folder / "toy_stages" / "toy.py").write_text(textwrap.dedent(TOY), encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def toy(toy_package, tmp_path, monkeypatch):
    """The module with the stage `toy`; `diary` says what it did, in this process and in others."""
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{toy_package}:{root}")
    (tmp_path / "diary").mkdir()
    monkeypatch.setenv("TOY_DIARY", str(tmp_path / "diary"))
    monkeypatch.delenv("TOY_MOOD", raising=False)
    from toy_stages import toy as module

    return module


@pytest.fixture
def diary(tmp_path):
    """Lines that the toy has noted under a name."""

    def read(name):
        path = tmp_path / "diary" / name
        return path.read_text().split() if path.exists() else []

    return read


@pytest.fixture
def documents(tmp_path):
    """Makes a small documents artifact whose texts are given, and returns its path."""

    def make(name, *texts):
        out = Outbox(tmp_path / name, DOCUMENTS, "elsewhere", 1, f"{abs(hash((name, texts))):064x}", {}, {})
        rows = [{"document_id": f"{name}-{i}", "text": text, "source": "test"} for i, text in enumerate(texts)]
        out.write(0, pa.Table.from_pylist(rows, schema=DOCUMENTS.schema()))
        artifact: Artifact = out.commit()
        return artifact.path

    return make
