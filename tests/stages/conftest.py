"""A world of small sums, a policy that has seen some of it, and what every stage makes of them."""

import json
import shutil
from itertools import count

import datasets
import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.artifacts import METRICS_FILE, Outbox
from pipeline.contracts import METRICS
from pipeline.models.checkpoint import save
from pipeline.models.fresh import ModelSpec, create
from pipeline.text import Chat
from stages.advantage import Settings as AdvantageSettings
from stages.advantage import advantage
from stages.ingest import Settings as IngestSettings
from stages.ingest import ingest
from stages.label import Settings as LabelSettings
from stages.label import label
from stages.rollout import Settings as RolloutSettings
from stages.rollout import rollout
from stages.score import Settings as ScoreSettings
from stages.score import score
from stages.sft import Settings as SftSettings
from stages.sft import sft

WORLD = {"terms": [2, 2], "largest": 6, "wrong_share": 0.5}
SPEC = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "max_position": 64}
SFT = {"new": SPEC, "epochs": 30, "batch": 10, "learning_rate": 5e-3, "tokens": 32}
SAMPLING = {
    "group_size": 4, "prompt_tokens": 8, "response_tokens": 16, "first": 0, "count": 12, "shard": 5, "seed": 7,
    "engine": "transformers",
}  # fmt: skip


@pytest.fixture(scope="session")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("room")


@pytest.fixture(scope="session")
def world():
    return WORLD


@pytest.fixture(scope="session")
def sft_settings():
    """`SftSettings` of the session's policy, with changes."""
    return lambda **changes: SftSettings.of(None, {**SFT, **changes})


@pytest.fixture(scope="session")
def sampling():
    """`RolloutSettings` of the session's rollouts, with changes."""
    return lambda **changes: RolloutSettings.of(None, {**SAMPLING, **changes})


@pytest.fixture(scope="session")
def made_of():
    """`ingest` of a built-in world."""

    def make(out, kind, count, **changes):
        given = {"kind": kind, "source": "arithmetic", "world": WORLD, "count": count, **changes}
        return ingest.run(out, IngestSettings.of(None, given))

    return make


@pytest.fixture(scope="session")
def prompts(room, made_of):
    return made_of(room / "prompts", "prompts", 20)


@pytest.fixture(scope="session")
def demonstrations(room, made_of):
    return made_of(room / "demonstrations", "demonstrations", 30)


@pytest.fixture(scope="session")
def policy(room, demonstrations, sft_settings):
    """Answers sums, about as often wrongly as rightly."""
    return sft.run(room / "policy", sft_settings(), demonstrations=demonstrations.path)


@pytest.fixture(scope="session")
def other_policy(room, policy):
    """The same tokenizer, other weights."""
    model, _ = create(ModelSpec(**SPEC, init_std=0.2), ["0123456789+=,;"], seed=5)
    save(model, Chat(policy.path).tokenizer, room / "other_policy")
    return room / "other_policy"


@pytest.fixture(scope="session")
def rollouts(room, prompts, policy, sampling):
    return rollout.run(room / "rollouts", sampling(), prompts=prompts.path, policy=policy.path)


@pytest.fixture(scope="session")
def labels(room, rollouts, prompts):
    settings = LabelSettings.of(None, {"label": {"kind": "verifier"}, "filter": [{"kind": "mixed_outcomes"}]})
    return label.run(room / "labels", settings, rollouts=rollouts.path, prompts=prompts.path)


@pytest.fixture(scope="session")
def scores(room, rollouts, labels, policy, other_policy):
    settings = ScoreSettings.of(None, {"needs": ["old_logprobs", "ref_logprobs"]})
    return score.run(
        room / "scores", settings, rollouts=[rollouts.path], labels=[labels.path], policy=policy.path,
        reference=other_policy,
    )  # fmt: skip


@pytest.fixture(scope="session")
def advantages(room, rollouts, labels, scores):
    settings = AdvantageSettings.of(None, {"advantage": {"kind": "group_mean"}, "normalize": {"kind": "group_std"}})
    return advantage.run(
        room / "advantages", settings, rollouts=[rollouts.path], labels=[labels.path], scores=scores.path
    )


@pytest.fixture(scope="session")
def by_hand(room):
    """Write an artifact: a contract, and the rows of each part."""
    number = count()

    def write(contract, *parts, metadata=None):
        outbox = Outbox(room / f"{contract.name}-by-hand-{next(number)}", contract, "hand", 1, "0" * 64, {}, {})
        for index, rows in enumerate(parts):
            table = pa.Table.from_pylist(rows, schema=contract.schema(rows[0]))
            outbox.write(index, table.replace_schema_metadata({**table.schema.metadata, **(metadata or {})}))
        return outbox.commit()

    return write


@pytest.fixture
def jsonl(tmp_path):
    """Write rows to a JSONL file."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def sound(tmp_path, monkeypatch):
    """Assert that an artifact keeps its contract, opens in the tools that people have, and measures by the contract."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)

    def check(artifact):
        artifact.check()
        METRICS.check(pq.read_table(artifact.path / METRICS_FILE), str(artifact.path))
        if not artifact.contract.is_table:
            return
        files = [str(path) for path in artifact.part_paths()]
        rows, names = artifact.stats["rows"], artifact.table().column_names
        frame = polars.read_parquet(files)
        assert (frame.height, frame.columns) == (rows, names)
        assert duckdb.sql(f"select count(*) from read_parquet({files})").fetchall() == [(rows,)]
        loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
        assert (loaded.num_rows, loaded.column_names) == (rows, names)
        assert loaded[0] == artifact.table().slice(0, 1).to_pylist()[0]

    return check


@pytest.fixture(scope="session")
def numbers():
    """The metrics of an artifact: (name, step) -> value."""

    def read(artifact):
        table = pq.read_table(artifact.path / METRICS_FILE).to_pylist()
        return {(row["name"], row["step"]): row["value"] for row in table}

    return read


@pytest.fixture
def survives(tmp_path, numbers):
    """Assert that a training killed before an optimizer step goes on from the last saving, to the very same end."""

    def told(artifact):
        measured = {
            key: value for key, value in numbers(artifact).items() if not key[0].startswith(("speed/", "time/"))
        }
        return measured, {name: value for name, value in artifact.stats.items() if name != "seconds"}

    def check(stage, settings, *, before, saved, **paths):
        whole, taken = stage.run(tmp_path / "whole", settings, **paths), []

        def die(*_):
            taken.append(len(taken))
            if len(taken) == before:
                raise KeyboardInterrupt

        hook = register_optimizer_step_pre_hook(die)
        try:
            with pytest.raises(KeyboardInterrupt):
                stage.run(tmp_path / "killed", settings, **paths)
            made = stage.run(tmp_path / "killed", settings, **paths)
        finally:
            hook.remove()
        assert f"going on from step {saved} of " in (made.path / "log.txt").read_text()
        steps = {step for name, step in numbers(made) if name == "grad/norm"}
        assert len(taken) - before == len(steps) - saved
        assert made.manifest.digest == whole.manifest.digest
        assert told(made) == told(whole)
        assert {path.name for path in made.path.iterdir()} == {path.name for path in whole.path.iterdir()}
        return made

    return check


@pytest.fixture(scope="session")
def forgetting(room, policy):
    """The session's policy, with dropout of its attention."""
    made = shutil.copytree(policy.path, room / "forgetting", ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return made
