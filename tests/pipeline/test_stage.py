"""The stage protocol, on a real stage in a package of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Optional

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.artifacts import Artifact, file_record, fingerprint_of
from pipeline.contracts import DOCUMENTS, LABELS, POLICY
from pipeline.errors import ArtifactError, ContractError, EngineError, ExperimentError, InputError
from pipeline.experiment import Experiment
from pipeline.stage import FILES, InputSpec, StageSettings, stage


@pytest.mark.parametrize(
    ("annotation", "contract", "many", "optional"),
    [
        (Annotated[Artifact, LABELS], LABELS, False, False),
        (Annotated[Artifact | None, LABELS], LABELS, False, True),
        (Annotated[Artifact, LABELS] | None, LABELS, False, True),
        (Optional[Annotated[Artifact, LABELS]], LABELS, False, True),  # noqa: UP045
        (Annotated[tuple[Artifact, ...], POLICY], POLICY, True, False),
        (Annotated[tuple[Artifact, ...] | None, POLICY], POLICY, True, True),
        (Annotated[tuple[Artifact, ...], POLICY] | None, POLICY, True, True),
        (Annotated[Path, FILES], None, False, False),
        (Annotated[tuple[Path, ...], FILES], None, True, False),
        (Annotated[tuple[Path, ...], FILES] | None, None, True, True),
    ],
)
def test_an_annotation_says_kind_number_and_need(annotation, contract, many, optional):
    assert InputSpec.of("x", annotation) == InputSpec("x", contract, many, optional)


def test_a_stage_says_what_its_signature_says(toy):
    assert toy.toy.reads == ("documents", "more_documents?", "files?")
    assert (toy.toy.name, toy.toy.version, toy.toy.hardware) == ("toy", 3, "cpu")
    assert toy.toy.summary == "Say the same thing over and over."
    assert toy.toy.contract(toy.Settings()) is DOCUMENTS


def test_of_several_kinds_the_setting_says_which_is_written(toy):
    class Settings(StageSettings):
        kind: str

    def either(inputs: toy.Inputs, settings: Settings, out: toy.Outbox) -> None:
        """Write one or the other."""

    both = stage(writes=(LABELS, DOCUMENTS), version=1, hardware="gpu")(either)
    assert both.contract(Settings(kind="labels")) is LABELS and both.contract(Settings(kind="documents")) is DOCUMENTS
    assert both.hardware == "gpu"


def test_a_run_makes_the_artifact_and_says_from_what(toy, documents, diary, tmp_path):
    one, two, three = documents("one", "a", "b"), documents("two", "c"), documents("three", "d")
    (tmp_path / "notes.txt").write_text("note")
    settings = toy.Settings(text="ho", shards=2)
    made = toy.toy.run(
        tmp_path / "run" / "out", settings, documents=one, more_documents=(two, three), files=[tmp_path / "notes.txt"]
    )
    assert [row["document_id"] for row in made.table().to_pylist()] == ["one-0-0", "one-1-0", "one-0-1", "one-1-1"]
    assert {row["text"] for row in made.table().to_pylist()} == {"ho"}
    manifest = made.manifest
    assert (manifest.stage, manifest.version, manifest.kind) == ("toy", 3, "documents")
    assert manifest.settings == settings.model_dump(mode="json")
    assert {name: [Path(r.path).name for r in records] for name, records in manifest.inputs.items()} == {
        "documents": ["one"], "more_documents": ["two", "three"], "files": ["notes.txt"],
    }  # fmt: skip
    assert manifest.inputs["documents"][0].digest == Artifact.open(one).manifest.digest
    assert manifest.fingerprint == fingerprint_of("toy", 3, manifest.settings, manifest.inputs)
    assert made.stats["read"] == 3 and diary("shards") == ["0", "1"]
    made.check()


def test_the_same_computation_is_reused_and_starts_nothing(toy, documents, diary, tmp_path):
    one, out = documents("one", "a"), tmp_path / "out"
    assert toy.toy.committed(out, toy.Settings(), documents=one) is None
    made = toy.toy.run(out, toy.Settings(), documents=one)
    shutil.copytree(one, tmp_path / "moved")
    for path in (one, str(one), tmp_path / "moved", [one]):
        assert toy.toy.run(out, toy.Settings(), documents=path) == made
        assert toy.toy.committed(out, toy.Settings(), documents=path) == made
    assert toy.toy.run(out, toy.Settings(), documents=one, more_documents=None, files=()) == made
    assert diary("runs") == ["run"]


def test_another_computation_is_refused_and_the_difference_named(toy, documents, diary, tmp_path):
    one, other, out = documents("one", "a"), documents("other", "b"), tmp_path / "out"
    made = toy.toy.run(out, toy.Settings(shape=toy.Shape(names={"a": "b"})), documents=one)
    cases = {
        "toy.text: 'hello' -> 'ho'": ({"text": "ho"}, {}),
        "toy.shape.height: 5 -> None": ({"shape": {"height": None, "names": {"a": "b"}}}, {}),
        "toy.shape.names.a: 'b' -> None": ({"shape": {}}, {}),
        "toy.tags: [] -> ['x']": ({"tags": ("x",)}, {}),
        "input documents has other bytes": ({}, {"documents": other}),
        "input more_documents has other bytes": ({}, {"more_documents": [other]}),
        "input files has other bytes": ({}, {"files": [one / "part-00000.parquet"]}),
    }
    for message, (settings, inputs) in cases.items():
        given = toy.Settings(**{"shape": {"names": {"a": "b"}}, **settings})
        for ask in (toy.toy.run, toy.toy.committed):
            with pytest.raises(ArtifactError) as caught:
                ask(out, given, **{"documents": one, **inputs})
            assert caught.value.what == f"made by a different computation ({message})"
            assert caught.value.where == str(out) and caught.value.do
    assert Artifact.open(out) == made and diary("runs") == ["run"]


def test_many_differences_are_counted_and_another_stage_is_named(toy, documents, tmp_path):
    one, out = documents("one", "a"), tmp_path / "out"
    toy.toy.run(out, toy.Settings(), documents=one)
    all_other = toy.Settings(text="t", shards=1, limit=1, tags=("a",), share=1, loud=True, part="a")
    with pytest.raises(ArtifactError, match="; and 2 more"):
        toy.toy.committed(out, all_other, documents=one)
    with pytest.raises(ArtifactError, match="stage elsewhere version 1 -> toy version 3"):
        toy.toy.run(one, toy.Settings(), documents=one)


def test_a_place_with_something_else_in_it_is_refused(toy, documents, diary, tmp_path):
    with pytest.raises(ArtifactError, match="not an artifact"):
        toy.toy.run(tmp_path, toy.Settings(), documents=documents("one", "a"))
    assert diary("runs") == []


def test_what_this_process_checked_as_it_wrote_it_is_not_checked_again_unless_it_is_of_several_parts(
    toy, documents, tmp_path, monkeypatch
):
    looked_at, check = [], Artifact.check
    monkeypatch.setattr("pipeline.stage._sound", set())  # other tests of this process have the same documents
    monkeypatch.setattr(Artifact, "check", lambda artifact: (looked_at.append(artifact.path.name), check(artifact)))
    one = documents("one", "a")
    for shards in (1, 2):
        made = toy.toy.run(tmp_path / f"of-{shards}", toy.Settings(shards=shards, text=f"{shards}"), documents=one)
        for text in ("once", "again"):
            toy.toy.run(tmp_path / f"{text}-{shards}", toy.Settings(text=text), documents=made.path)
    assert looked_at == ["one", "of-2"]


def test_a_table_that_was_sound_is_looked_at_again_once_it_has_other_bytes(toy, documents, diary, tmp_path):
    one = documents("one", "a")
    toy.toy.run(tmp_path / "first", toy.Settings(), documents=one)
    toy.toy.run(tmp_path / "second", toy.Settings(text="ho"), documents=one)
    part = one / "part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:4] + bytes([whole[4] ^ 1]) + whole[5:])
    with pytest.raises(ArtifactError, match=r"not as it was made: part-00000\.parquet: other bytes"):
        toy.toy.run(tmp_path / "third", toy.Settings(text="hi"), documents=one)
    broken = pq.read_table(tmp_path / "first" / "part-00000.parquet")
    pq.write_table(pa.concat_tables([broken, broken]), part)
    manifest = json.loads((one / "manifest.json").read_text())
    manifest["files"][part.name] = file_record(part).model_dump()
    (one / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):
        with pytest.raises(ContractError):
            toy.toy.run(tmp_path / "third", toy.Settings(text="hi"), documents=one)
    assert diary("runs") == ["run", "run"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_wrong_input_is_refused_before_anything_runs(toy, documents, diary, tmp_path, exists):
    one, out = documents("one", "a", "b"), tmp_path / "out"
    with pytest.raises(InputError, match="stage toy needs --documents"):
        toy.toy.run(out, toy.Settings())
    with pytest.raises(ArtifactError, match="no such artifact"):
        toy.toy.run(out, toy.Settings(), documents=tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such file"):
        toy.toy.run(out, toy.Settings(), documents=one, files=[tmp_path / "nowhere"])
    part = one / "part-00000.parquet"
    if exists:
        part.write_bytes(part.read_bytes()[:-1])
    else:
        part.unlink()
    with pytest.raises(ArtifactError, match="not as it was made"):
        toy.toy.run(out, toy.Settings(), documents=one)
    assert diary("runs") == [] and not list(tmp_path.glob(".part-out*"))


def test_a_folder_from_outside_is_named_by_all_of_its_bytes(toy, documents, tmp_path):
    folder, one = tmp_path / "folder", documents("one", "a")
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "x").write_text("1")
    made = toy.toy.run(tmp_path / "out", toy.Settings(), documents=one, files=folder)
    (folder / "deep" / "x").write_text("2")
    with pytest.raises(ArtifactError, match="input files has other bytes"):
        toy.toy.committed(tmp_path / "out", toy.Settings(), documents=one, files=folder)
    (folder / "deep" / "x").write_text("1")
    assert toy.toy.committed(tmp_path / "out", toy.Settings(), documents=one, files=folder) == made


def test_after_a_failure_the_finished_shards_are_kept_and_used(toy, documents, diary, tmp_path, monkeypatch):
    one = documents("one", "a")
    whole = toy.toy.run(tmp_path / "whole", toy.Settings(shards=4), documents=one)
    monkeypatch.setenv("TOY_MOOD", "failure")
    for _ in range(2):
        with pytest.raises(EngineError):
            toy.toy.run(tmp_path / "out", toy.Settings(shards=4), documents=one)
        assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".part-out-*"))) == 1
    monkeypatch.delenv("TOY_MOOD")
    made = toy.toy.run(tmp_path / "out", toy.Settings(shards=4), documents=one)
    assert diary("shards") == [*"0123", *"01", *"23"]
    assert (made.manifest.fingerprint, made.manifest.digest) == (whole.manifest.fingerprint, whole.manifest.digest)
    assert not list(tmp_path.glob(".part-*"))


@pytest.mark.parametrize(("mood", "error"), [("request", InputError), ("careless", ContractError)])
def test_after_an_error_of_the_request_nothing_is_left(toy, documents, tmp_path, monkeypatch, mood, error):
    one = documents("one", "a")
    monkeypatch.setenv("TOY_MOOD", mood)
    with pytest.raises(error):
        toy.toy.run(tmp_path / "out", toy.Settings(), documents=one)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diary", "one"]


def test_settings_come_from_the_experiment_with_changes_on_top(toy, experiment_file):
    experiment = Experiment.load(experiment_file)
    settings = toy.Settings.of(experiment, {"part": "a", "text": "x"})
    assert (settings.limit, settings.shards, settings.shape.width, settings.text) == (3, 2, 9, "x")
    assert toy.Settings.of(experiment, {"part": "a", "limit": None}).limit is None
    assert toy.Settings.of(None) == toy.Settings()
    with pytest.raises(ExperimentError, match=r"shards: .*\[input_value='x'\]") as caught:
        toy.Settings.of(experiment, {"part": "a", "shards": "x"})
    assert caught.value.where == "settings of stage toy"
    with pytest.raises(ExperimentError, match="shrads"):
        toy.Settings.of(None, {"shrads": 1})


def same(toy, words, settings, **paths):
    """What the words come to, and what the settings come to, without a process for it."""
    given = toy.toy.parser().parse_args(words[3:])
    made = toy.toy.run_arguments(given)
    direct = toy.toy.run(Path(given.out).with_name("direct"), settings, **paths)
    assert made.manifest.settings == direct.manifest.settings
    assert made.manifest.fingerprint == direct.manifest.fingerprint
    assert made.manifest.digest == direct.manifest.digest
    for made_path in (made.path, direct.path):
        shutil.rmtree(made_path)


TEXT = st.text("ab 1\"'\\\n\t=#.,{}[]ü🙂\x00-", max_size=8)
SHAPES = st.fixed_dictionaries(
    {}, optional={
        "width": st.integers(-5, 5), "height": st.none() | st.integers(),
        "names": st.dictionaries(TEXT, TEXT, max_size=2),
    },
)  # fmt: skip
CHANGES = st.fixed_dictionaries(
    {"part": st.sampled_from("ab")},
    optional={
        "text": TEXT, "shards": st.integers(1, 3), "limit": st.none() | st.integers(-(2**40), 2**40),
        "tags": st.lists(TEXT, max_size=3), "share": st.floats(allow_nan=False), "loud": st.booleans(), "shape": SHAPES,
        "shapes": st.lists(SHAPES.filter(lambda shape: shape.get("height", 0) is not None), max_size=2),
    },
)  # fmt: skip


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, with_experiment=st.booleans())
def test_a_command_comes_to_the_same_as_the_run(toy, documents, experiment_file, tmp_path, changes, with_experiment):
    one = tmp_path / "one" if (tmp_path / "one").exists() else documents("one", "a")
    experiment = Experiment.load(experiment_file) if with_experiment else None
    settings = toy.Settings.of(experiment, changes)
    words = toy.toy.command(
        tmp_path / "out", settings, (experiment, experiment_file) if experiment else None, documents=one,
        more_documents=[one, one],
    )  # fmt: skip
    same(toy, words, settings, documents=one, more_documents=[one, one])


@pytest.mark.parametrize("with_experiment", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"limit": None}, {"limit": 7}, {"limit": 3}, {"shape": {"height": None}}, {"shape": {"width": 2}},
        {"text": ""}, {"text": "two\nlines = 1"}, {"text": "true"}, {"text": "-1"}, {"text": 'a "b" \'c\' \\'},
        {"tags": ()}, {"tags": ("", "a b")}, {"share": 1}, {"share": 1e300}, {"share": float("inf")},
        {"shape": {"names": {"a.b": "c", "": "d"}}}, {"shapes": ({"names": {"x": "y"}}, {})},
    ],
)  # fmt: skip
def test_a_setting_survives_the_command_line(toy, documents, experiment_file, tmp_path, changes, with_experiment):
    one = documents("one", "a")
    experiment = Experiment.load(experiment_file) if with_experiment else None
    settings = toy.Settings.of(experiment, {"part": "b", **changes})
    context = (experiment, experiment_file) if experiment else None
    same(toy, toy.toy.command(tmp_path / "out", settings, context, documents=one), settings, documents=one)


def test_a_command_says_only_what_the_experiment_does_not(toy, experiment_file, tmp_path):
    experiment = Experiment.load(experiment_file)
    settings = toy.Settings.of(experiment, {"part": "a", "text": "x"})
    words = toy.toy.command(
        tmp_path / "out", settings, (experiment, experiment_file), "py", documents=Path("d"), files=()
    )
    assert words == [
        "py", "-m", "toy_stages.toy", "--experiment", str(experiment_file), "--documents", "d",
        "--set", 'text="x"', "--set", 'part="a"', "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def test_a_nested_setting_is_changed_alone_on_the_command_line(toy, documents, experiment_file, tmp_path):
    words = [
        "--documents",
        str(documents("one", "a")),
        "--experiment",
        str(experiment_file),
        "--out",
        str(tmp_path / "out"),
    ]
    words += ["--set", "part=a", "--set", "shape.height=8", "--set", "text=plain text"]
    made = toy.toy.run_arguments(toy.toy.parser().parse_args(words))
    assert made.manifest.settings["shape"] == {"width": 9, "height": 8, "names": {}}
    assert made.manifest.settings["text"] == "plain text"


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "toy_stages.toy", *map(str, words)], capture_output=True, text=True, check=False
    )


def test_a_command_in_a_process_of_its_own(toy, documents, experiment_file, tmp_path, monkeypatch):
    one = documents("one", "a")
    experiment = Experiment.load(experiment_file)
    settings = toy.Settings.of(experiment, {"part": "a", "text": "a 'b' \"c\"\n$(d)", "limit": None})
    words = toy.toy.command(
        tmp_path / "out", settings, (experiment, experiment_file), documents=one, files=[experiment_file]
    )
    told = subprocess.run(words, capture_output=True, text=True, check=False)
    direct = toy.toy.run(tmp_path / "direct", settings, documents=one, files=[experiment_file])
    made = Artifact.open(tmp_path / "out")
    assert told.returncode == 0 and f"toy -> {made.path}  digest {made.manifest.digest[:16]}" in told.stderr
    assert (made.manifest.fingerprint, made.manifest.digest) == (direct.manifest.fingerprint, direct.manifest.digest)
    refused = run("--documents", one, "--out", tmp_path / "out")
    assert refused.returncode == 2 and refused.stderr.startswith("error: made by a different computation (toy.")
    monkeypatch.setenv("TOY_MOOD", "failure")
    failed = run("--documents", one, "--out", tmp_path / "other")
    assert failed.returncode == 1 and failed.stderr == "error: tired\n"


def code(toy, *words):
    with pytest.raises(SystemExit) as caught:
        toy.toy.main(list(map(str, words)))
    return caught.value.code


def test_exit_codes(toy, documents, tmp_path, monkeypatch, capsys):
    one = documents("one", "a")
    assert toy.toy.main(["--documents", str(one), "--out", str(tmp_path / "good")]) is None
    assert code(toy, "--out", tmp_path / "x") == 2
    assert code(toy, "--documents", tmp_path / "nowhere", "--out", tmp_path / "x") == 2
    assert code(toy, "--documents", one, "--out", tmp_path / "x", "--set", "shards=x") == 2
    assert code(toy, "--documents", one, "--out", tmp_path / "x", "--experiment", tmp_path / "no.toml") == 2
    capsys.readouterr()
    monkeypatch.setenv("TOY_MOOD", "request")
    assert code(toy, "--documents", one, "--out", tmp_path / "x") == 2
    assert capsys.readouterr().err == "error: nothing suits me\n  where: here\n  next:  change something\n"
    monkeypatch.setenv("TOY_MOOD", "failure")
    assert code(toy, "--documents", one, "--out", tmp_path / "x") == 1


def test_help_lists_inputs_and_settings(toy, capsys):
    assert code(toy, "--help") == 0
    text = capsys.readouterr().out
    for option in ("--documents PATH", "--more-documents PATH", "--files PATH", "--experiment", "--set", "--out"):
        assert option in text
    assert "Longer words about it, 100% of them." in text
    for name, info in toy.Settings.model_fields.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert info.description in line and repr(info.get_default(call_default_factory=True)) in line
