"""Artifacts: whole or absent, named by what they were made from and by what they hold."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import artifacts
from pipeline.artifacts import (
    Artifact,
    InputRecord,
    Manifest,
    Outbox,
    digest_of,
    file_record,
    fingerprint_of,
    place_of,
    read_part,
    write_part,
)
from pipeline.contracts import CRITIC, DOCUMENTS, MESSAGES, POLICY, PROMPTS, REWARD_MODEL, ROLLOUTS
from pipeline.disk import identity
from pipeline.errors import ArtifactError, BusyError, ContractError, StorageError

FINGERPRINT = "ab" * 32


def part(*names, text="t"):
    rows = [{"document_id": name, "text": text, "source": "s"} for name in names]
    return pa.Table.from_pylist(rows, schema=DOCUMENTS.schema())


def outbox(target, fingerprint=FINGERPRINT, contract=DOCUMENTS):
    return Outbox(target, contract, "tell", 1, fingerprint, {"a": 1}, {})


def make(target, *parts, fingerprint=FINGERPRINT):
    out = outbox(target, fingerprint)
    for index, rows in enumerate(parts or (part("a", "b"), part("c"))):
        out.write(index, rows)
    return out.commit()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
SETTINGS = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)
DIGESTS = st.dictionaries(st.text("xyz", min_size=1), st.lists(st.text("01", min_size=1), min_size=1), max_size=3)


def records(digests, path="p", fingerprint="f"):
    return {n: [InputRecord(path=path, fingerprint=fingerprint, digest=d) for d in ds] for n, ds in digests.items()}


def reordered(value):
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(SETTINGS, DIGESTS)
def test_a_fingerprint_ignores_the_order_of_keys_and_the_paths_of_inputs(settings, digests):
    one = fingerprint_of("s", 1, settings, records(digests))
    moved = records(reordered(digests), "elsewhere", "made otherwise")
    moved = {name: list(reversed(moved[name]))[::-1] for name in moved}
    assert fingerprint_of("s", 1, reordered(settings), records(digests, "elsewhere", "made otherwise")) == one
    assert len(one) == 64 and {name: len(m) for name, m in moved.items()} == {n: len(d) for n, d in digests.items()}


@given(SETTINGS, DIGESTS, SETTINGS, DIGESTS)
def test_a_fingerprint_changes_with_any_setting_and_any_digest(settings, digests, other_settings, other_digests):
    def canonical(*values):
        return json.dumps(values, sort_keys=True)

    same = canonical(settings, digests) == canonical(other_settings, other_digests)
    one, other = (
        fingerprint_of("s", 1, s, records(d)) for s, d in ((settings, digests), (other_settings, other_digests))
    )
    assert (one == other) == same


@given(SETTINGS, st.text(max_size=3), VALUES)
def test_a_fingerprint_changes_when_one_setting_does(settings, name, value):
    changed = {**settings, name: value}
    same = json.dumps(changed, sort_keys=True) == json.dumps(settings, sort_keys=True)
    assert (fingerprint_of("s", 1, settings, {}) == fingerprint_of("s", 1, changed, {})) == same


def test_a_fingerprint_changes_with_stage_version_and_order_of_inputs():
    names = {fingerprint_of(stage, version, {}, {}) for stage in ("a", "b") for version in (1, 2)}
    assert len(names) == 4
    assert fingerprint_of("s", 1, {}, records({"x": ["0", "1"]})) != fingerprint_of(
        "s", 1, {}, records({"x": ["1", "0"]})
    )


def test_an_artifact_is_opened_as_it_was_made(tmp_path):
    made = make(tmp_path / "run" / "0003" / "docs")
    opened = Artifact.open(tmp_path / "run" / "0003" / "docs", DOCUMENTS)
    assert opened == made
    assert opened.table().to_pylist() == part("a", "b", "c").to_pylist()
    assert opened.table(["text"]).column_names == ["text"]
    assert [p.name for p in opened.part_paths()] == ["part-00000.parquet", "part-00001.parquet"]
    opened.check()
    manifest = opened.manifest
    assert (manifest.kind, manifest.stage, manifest.settings, manifest.fingerprint) == (
        "documents",
        "tell",
        {"a": 1},
        FINGERPRINT,
    )
    assert manifest.files["part-00000.parquet"].rows == 2 and opened.stats["rows"] == 3
    assert set(manifest.files) == {"part-00000.parquet", "part-00001.parquet"}
    assert {"time", "host", "python", "versions", "git", "command"} <= set(manifest.made)
    measured = pa.parquet.read_table(opened.path / "metrics.parquet").to_pylist()
    assert [(m["run"], m["iteration"], m["stage"], m["name"]) for m in measured] == [("run", 3, "docs", "time/seconds")]
    assert list(tmp_path.rglob(".part-*")) == []


def test_the_digest_is_of_the_data_and_not_of_its_making(tmp_path):
    out = outbox(tmp_path / "b")
    out.log("something else happened")
    out.metrics.add("area/what", 2.0)
    out.write(0, part("a", "b"))
    out.write(1, part("c"))
    assert out.commit().manifest.digest == make(tmp_path / "a").manifest.digest
    assert make(tmp_path / "c", part("a", "b"), part("d")).manifest.digest != make(tmp_path / "d").manifest.digest
    assert "something else" in (tmp_path / "b" / "log.txt").read_text()


@given(st.dictionaries(st.sampled_from(["a", "b", "c/d"]), st.binary(max_size=3), max_size=3), st.data())
def test_a_digest_is_of_names_and_bytes(tmp_path_factory, files, data):
    folder = tmp_path_factory.mktemp("files")

    def digest(contents):
        for name, content in contents.items():
            (folder / "x").write_bytes(content)
            contents = {**contents, name: file_record(folder / "x")}
        return digest_of(contents)

    assert digest(files) == digest(dict(reversed(files.items())))
    other = data.draw(st.dictionaries(st.sampled_from(["a", "b", "c/d"]), st.binary(max_size=3), max_size=3))
    assert (digest(files) == digest(other)) == (files == other)


def test_a_finished_shard_is_not_made_again_and_the_digest_is_as_if_nothing_had_happened(tmp_path):
    first = outbox(tmp_path / "x")
    assert list(first.shards(3)) == [0, 1, 2]
    first.write(1, part("b"))
    first.close()
    again = outbox(tmp_path / "x")
    assert list(again.shards(3)) == [0, 2]
    for index in again.shards(3):
        again.write(index, part("abc"[index]))
    assert [p["document_id"].to_pylist() for p in again.parts()] == [["a"], ["b"], ["c"]]
    whole = make(tmp_path / "y", part("a"), part("b"), part("c"))
    assert again.commit().manifest.digest == whole.manifest.digest


def test_another_computation_does_not_find_the_shards(tmp_path):
    out = outbox(tmp_path / "x")
    out.write(0, part("a"))
    out.close()
    other = outbox(tmp_path / "x", "cd" * 32)
    assert list(other.shards(1)) == [0]
    other.discard()


def test_a_part_that_breaks_its_contract_is_not_written(tmp_path):
    out = outbox(tmp_path / "x")
    with pytest.raises(ContractError, match="not unique") as caught:
        out.write(0, part("a", "a"))
    assert caught.value.where == str(tmp_path / "x")
    assert list(out.shards(1)) == [0]
    out.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parts", [(), (part(),), (part(), part())], ids=["no part", "empty part", "empty parts"])
def test_an_empty_dataset_is_not_committed(tmp_path, parts):
    out = outbox(tmp_path / "x")
    for index, rows in enumerate(parts):
        out.write(index, rows)
    with pytest.raises(ContractError, match="documents: empty dataset"):
        out.commit()
    out.discard()
    assert not (tmp_path / "x").exists()


def test_of_two_computations_the_second_loses_and_the_first_stays(tmp_path):
    slow, fast = outbox(tmp_path / "x"), outbox(tmp_path / "x", "cd" * 32)
    slow.write(0, part("slow"))
    fast.write(0, part("fast"))
    won = fast.commit()
    with pytest.raises(BusyError, match="another process committed first"):
        slow.commit()
    slow.discard()
    assert Artifact.open(tmp_path / "x") == won
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def checkpoint_of(target, files):
    out = outbox(target, contract=POLICY)
    for name, content in files.items():
        (out.path / name).parent.mkdir(exist_ok=True)
        (out.path / name).write_bytes(content)
    return out


def test_all_that_a_manifest_answers_for_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, there = [], artifacts.flush
    monkeypatch.setattr(artifacts, "flush", lambda path: flushed.append(path.name) or there(path))
    large = {f"{name}.safetensors": name.encode() * (artifacts.LARGE + 1) for name in "abc"}
    out = checkpoint_of(tmp_path / "policy", {**large, "config.json": b"{}", "more/x.txt": b"x"})
    scratch = out.path.name
    made = out.commit()
    last = ["manifest.json", scratch, tmp_path.name]
    assert sorted(flushed[:-3]) == sorted([*large, "config.json", "x.txt"]) and flushed[-3:] == last
    for name, record in made.manifest.files.items():
        content = (made.path / name).read_bytes()
        assert (record.bytes, record.blake2b) == (len(content), hashlib.blake2b(content, digest_size=32).hexdigest())


def test_what_was_settled_is_neither_read_nor_flushed_again_unless_it_was_written_again(tmp_path, monkeypatch):
    done, flushes, hashes = [], artifacts.flush, artifacts._hash_of._make
    monkeypatch.setattr(artifacts, "flush", lambda path: done.append(("flushed", path.name)) or flushes(path))
    monkeypatch.setattr(artifacts._hash_of, "_make", lambda path: done.append(("hashed", path.name)) or hashes(path))
    once, again = (name * (artifacts.LARGE + 1) for name in (b"a", b"b"))
    out = checkpoint_of(tmp_path / "policy", {"once": once, "again": b"before", "more/again": again})
    out.settle()
    (out.path / "again").write_bytes(again)
    (out.path / "more/again").write_bytes(once)
    (out.path / "after").write_bytes(b"after")
    made = out.commit()
    assert done.count(("flushed", "once")) == done.count(("hashed", "once")) == 1
    assert done.count(("flushed", "again")) == 4 and done.count(("flushed", "after")) == 1
    for name, content in {"once": once, "again": again, "more/again": once, "after": b"after"}.items():
        assert made.manifest.files[name].blake2b == hashlib.blake2b(content, digest_size=32).hexdigest(), name


@pytest.mark.parametrize("refused", ["config.json", "manifest.json", ".part-policy-abababab"])
def test_what_the_disk_refuses_to_keep_is_not_committed(tmp_path, monkeypatch, refused):
    out = checkpoint_of(tmp_path / "policy", {"config.json": b"{}", "model.safetensors": b"x"})

    def flush(path):
        if path.name == refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(artifacts, "flush", flush)
    with pytest.raises(OSError, match="Input/output error"):
        out.commit()
    out.close()
    assert not (tmp_path / "policy").exists()
    assert (out.path / "manifest.json").exists() == (refused != "config.json")


@pytest.mark.parametrize("kept", [0, 10])
def test_parts_are_made_again_where_a_machine_went_down_with_what_was_known_of_them(tmp_path, monkeypatch, kept):
    out = outbox(tmp_path / "x")
    out.write(0, part("a"))
    monkeypatch.setattr(Path, "rename", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.commit()
    monkeypatch.undo()
    out.close()
    os.truncate(out.path / "manifest.json", kept)
    again = outbox(tmp_path / "x")
    assert list(again.shards(1)) == [0]
    again.write(0, part("a"))
    assert again.commit().table().num_rows == 1


def test_large_files_that_were_damaged_are_found_whatever_else_is_gone(tmp_path):
    large = {f"{name}.safetensors": name.encode() * (artifacts.LARGE + 1) for name in "abcd"}
    made = checkpoint_of(tmp_path / "policy", large).commit()
    (made.path / "a.safetensors").unlink()
    for name, change in (("b", b"?"), ("c", b"c")):
        content = (made.path / f"{name}.safetensors").read_bytes()
        (made.path / f"{name}.safetensors").write_bytes(content[:-1] + change)
    assert made.faults() == ["a.safetensors: gone", "b.safetensors: other bytes than it was made with"]


def test_of_two_writers_of_one_computation_the_second_does_not_start(tmp_path):
    first = outbox(tmp_path / "x")
    first.write(0, part("a"))
    with pytest.raises(BusyError, match=rf"process {os.getpid()} on .* is making it right now"):
        outbox(tmp_path / "x")
    first.write(1, part("b"))
    assert first.commit().table().num_rows == 2
    after = outbox(tmp_path / "x")
    assert list(after.shards(1)) == [0]
    after.discard()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write: Not a directory") as caught:
        outbox(tmp_path / "file" / "x")
    assert caught.value.where == str(tmp_path / "file" / "x")


def test_what_is_not_an_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such artifact"):
        Artifact.open(tmp_path / "x")
    (tmp_path / "x").mkdir()
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        Artifact.open(tmp_path / "x")
    for content in (b"", b"{", b'{"kind": "documents"}', b"\xff"):
        (tmp_path / "x" / "manifest.json").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"unreadable manifest\.json") as caught:
            Artifact.open(tmp_path / "x")
        assert caught.value.where == str(tmp_path / "x")


def test_an_artifact_of_another_kind_or_an_unknown_contract_is_refused(tmp_path):
    made = make(tmp_path / "x")
    for contract in (PROMPTS, POLICY):
        with pytest.raises(ArtifactError, match=f"expected {contract.name}, found documents"):
            Artifact.open(made.path, contract)
    for change in ({"contract": 99}, {"kind": "dreams"}):
        text = made.manifest.model_copy(update=change).model_dump_json()
        (made.path / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match="unknown contract"):
            Artifact.open(made.path)


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_truncated_part_is_refused(tmp_path, cut):
    made = make(tmp_path / "x")
    path = made.path / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    for read in (made.table, made.check):
        with pytest.raises(ArtifactError, match="unreadable part") as caught:
            read()
        assert caught.value.where == str(path)


def test_a_part_that_is_gone_is_refused(tmp_path):
    made = make(tmp_path / "x")
    (made.path / "part-00000.parquet").unlink()
    with pytest.raises(ArtifactError, match="unreadable part"):
        Artifact.open(made.path).table()


def test_only_what_comes_again_has_a_dictionary_in_a_part(tmp_path):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    rows = [
        {"name": f"n{i % 3}", "turns": turns, "tokens": [i % 2, 1], "logprobs": [-float(i), -0.5], "reward": float(i)}
        for i in range(400)
    ]
    schema = pa.schema({
        "name": pa.string(), "turns": MESSAGES, "tokens": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32()),
        "reward": pa.float64(),
    })  # fmt: skip
    write_part(pa.Table.from_pylist(rows, schema), tmp_path / "x.parquet")
    group = pq.read_metadata(tmp_path / "x.parquet").row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    coded = {column.path_in_schema: "RLE_DICTIONARY" in column.encodings for column in columns}
    assert coded == {
        "name": True, "turns.list.element.role": True, "turns.list.element.content": True, "tokens.list.element": True,
        "logprobs.list.element": False, "reward": False,
    }  # fmt: skip
    assert {column.compression for column in columns} == {"ZSTD"}
    assert read_part(tmp_path / "x.parquet").to_pylist() == rows


def test_a_small_part_is_read_once_while_it_is_what_it_was(tmp_path, monkeypatch):
    opened, files = pq.ParquetFile, []
    monkeypatch.setattr(pq, "ParquetFile", lambda path: files.append(path.name) or opened(path))
    made, large = make(tmp_path / "docs"), "".join(map(chr, range(0xE000, 0x3FFFF)))
    for columns in (None, ["text"], ["source", "text"], ["text", "document_id"]):
        found = made.table(columns)
        assert found == part("a", "b", "c").select(columns or found.column_names)
    assert files == ["part-00000.parquet", "part-00001.parquet"]
    with pytest.raises(ArtifactError, match="no column words"):
        made.table(["words"])
    other = make(tmp_path / "other", part("a", text="other words"), fingerprint="cd" * 32)
    shutil.copy(other.part_paths()[0], made.part_paths()[0])  # in its place, and of its time
    os.utime(made.part_paths()[0], ns=(0, 0))
    assert made.table(["text"])["text"].to_pylist() == ["other words", "t"]
    wide = make(tmp_path / "wide", part("a", text=large), fingerprint="ef" * 32)
    files.clear()
    assert [wide.table(["text"])["text"].to_pylist() for _ in range(2)] == [[large]] * 2
    assert len(files) == 2


def test_a_manifest_is_what_its_file_says_now(tmp_path):
    made = make(tmp_path / "docs")
    assert Manifest.read(made.path) is made.manifest  # known to who wrote it
    file = made.path / "manifest.json"
    read = Manifest.model_validate_json(file.read_bytes())
    assert read == made.manifest
    file.write_text(file.read_text().replace('"stage": "tell"', '"stage": "show"'))
    assert Manifest.read(made.path) == read.model_copy(update={"stage": "show"})
    file.write_text("{")
    with pytest.raises(ArtifactError, match="unreadable"):
        Manifest.read(made.path)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        Manifest.read(made.path)


def test_a_file_is_the_same_where_its_directory_is_moved_and_another_once_it_is_written_to(tmp_path):
    made = make(tmp_path / "out")
    path = made.part_paths()[0]
    before, times = identity(path), path.stat()
    assert made.faults() == []
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert identity(moved / path.name) == before
    damaged = bytearray((moved / path.name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (moved / path.name).write_bytes(damaged)
    os.utime(moved / path.name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity(moved / path.name) != before
    assert Artifact.open(moved).faults() == [f"{path.name}: other bytes than it was made with"]


def test_a_key_in_two_parts_is_found(tmp_path):
    made = make(tmp_path / "x", part("a", "b"), part("b"))
    with pytest.raises(ContractError, match="not unique"):
        made.check()


def test_a_group_in_two_parts_is_found(tmp_path, monkeypatch):
    def rollouts(*keys):
        rows = [
            {
                "prompt_id": prompt, "sample": sample, "prompt_tokens": [1], "response_tokens": [1], "response": "x",
                "sampler_logprobs": None, "finish": "stop", "seed": 0,
            }
            for prompt, sample in keys
        ]  # fmt: skip
        return pa.Table.from_pylist(rows, schema=ROLLOUTS.schema(rows[0]))

    for name, last in (("good", [("q", 0), ("r", 0)]), ("bad", [("q", 0), ("p", 1)])):
        out = outbox(tmp_path / name, contract=ROLLOUTS)
        out.write(0, rollouts(("p", 0)))
        out.write(1, rollouts(*last))
        made = out.commit()
        if name == "good":
            with monkeypatch.context() as patched:  # nor are all keys read at once where groups lie apart
                patched.setattr(Artifact, "table", None)
                made.check()
        else:
            with pytest.raises(ContractError, match="do not stand together"):
                made.check()


def test_a_checkpoint_from_elsewhere_is_named_by_its_bytes(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ArtifactError, match="no such checkpoint"):
        Artifact.open(folder, POLICY)
    (folder / "deep").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        Artifact.open(folder, POLICY)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights").write_bytes(b"1")
    one = Artifact.open(folder, POLICY)
    assert one.manifest.fingerprint == one.manifest.digest and one.contract == POLICY
    assert set(one.manifest.files) == {"config.json", "deep/weights"}
    shutil.copytree(folder, tmp_path / "copy")
    assert Artifact.open(tmp_path / "copy", POLICY).manifest.digest == one.manifest.digest
    (folder / "deep" / "weights").write_bytes(b"2")
    assert Artifact.open(folder, POLICY).manifest.digest != one.manifest.digest


@pytest.mark.parametrize(
    ("contract", "architecture", "other"),
    [
        (REWARD_MODEL, "Qwen3ForSequenceClassification", "Qwen3ForTokenClassification"),
        (CRITIC, "Qwen3ForTokenClassification", "Qwen3ForCausalLM"),
    ],
    ids=["reward_model", "critic"],
)
def test_a_reward_model_or_critic_from_elsewhere_must_say_that_it_is_one(tmp_path, contract, architecture, other):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architectures": [architecture]}))
    adopted = Artifact.open(tmp_path, contract)
    assert (adopted.manifest.kind, adopted.manifest.stage, adopted.contract) == (contract.name, "elsewhere", contract)
    for text in (json.dumps({"architectures": [other]}), '{"architectures": null}', "{}"):
        config.write_text(text)
        with pytest.raises(ArtifactError, match=f"not a {contract.name}") as caught:
            Artifact.open(tmp_path, contract)
        assert (caught.value.where, f"`{contract.name}` artifact" in caught.value.do) == (str(config), True)
    for content, fault in ((b"\xff{", "not valid JSON"), (b"[]", "not a JSON object but a list")):
        config.write_bytes(content)
        with pytest.raises(ArtifactError, match=fault):
            Artifact.open(tmp_path, contract)


@pytest.mark.parametrize("made", [POLICY, REWARD_MODEL, CRITIC], ids=lambda contract: contract.name)
def test_a_made_checkpoint_of_another_kind_is_refused(tmp_path, made):
    out = outbox(tmp_path / "made", contract=made)
    (out.path / "config.json").write_text("{}")
    path = out.commit().path
    assert Artifact.open(path, made).contract == made
    for other in {POLICY, REWARD_MODEL, CRITIC} - {made}:
        with pytest.raises(ArtifactError, match=f"expected {other.name}, found {made.name}"):
            Artifact.open(path, other)


def test_a_checkpoint_that_a_stage_made_is_one_directory_of_files(tmp_path):
    out = outbox(tmp_path / "policy", contract=POLICY)
    (out.path / "config.json").write_text("{}")
    (out.path / "trainer").mkdir()
    (out.path / "trainer" / "state.pt").write_bytes(b"x")
    made = out.commit()
    assert set(made.manifest.files) == {"config.json", "trainer/state.pt"} and "rows" not in made.stats
    assert Artifact.open(made.path, POLICY) == made


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("runs/x/0003/labels-0", ("x", 3)), ("/a/x/0000/policy", ("x", 0)), ("runs/x/eval/0012/rollouts", ("x", 12)),
        ("runs/x/sft", ("x", None)), ("data/prompts", ("data", None)), ("runs/x/003/y", ("003", None)),
        ("/x", ("", None)),
    ],
)  # fmt: skip
def test_run_and_iteration_are_read_from_the_place(path, place):
    assert place_of(Path(path)) == place


def test_a_relative_place_is_read_from_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "x" / "0004").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x" / "0004")
    assert place_of(Path("labels-1")) == ("x", 4)


KILLED = textwrap.dedent("""
    import json, os, random, signal, sys, time
    from pathlib import Path

    import pyarrow as pa
    from pipeline.artifacts import Artifact, Outbox, digest_of, file_record
    from pipeline.contracts import DOCUMENTS
    from pipeline.errors import ArtifactError

    ROOT, SHARDS = Path(sys.argv[1]), 4
    EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "fcntl.flock"}

    def write(target):
        out = Outbox(target, DOCUMENTS, "tell", 1, "ab" * 32, {}, {})
        for index in out.shards(SHARDS):
            rows = [{"document_id": f"{index}-{i}", "text": "x" * 50, "source": "s"} for i in range(50)]
            out.write(index, pa.Table.from_pylist(rows, schema=DOCUMENTS.schema()))
        out.log("done")
        return out.commit()

    def die_at(count, target):
        def hook(event, arguments):
            nonlocal count
            if event in EVENTS and str(ROOT) in str(arguments):
                count -= 1
                if count < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        if count is not None:
            sys.addaudithook(hook)
        write(target)
        os._exit(0)

    def forked(count, target, seconds=None):
        child = os.fork()
        if not child:
            die_at(count, target)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    def whole(target):
        manifest = Artifact.open(target).manifest
        there = {p.name: file_record(p) for p in target.glob("part-*")}
        return there == manifest.files and digest_of(there) == manifest.digest and len(there) == SHARDS

    def story(name, *how):
        target = ROOT / name
        status = forked(*how[:1], target, *how[1:])
        finished = {p.name: p.stat().st_ino for p in ROOT.glob(f".part-{name}-*/part-*.parquet")}
        absent, good = not target.exists(), target.exists() and whole(target)
        if absent:
            again = forked(None, target)
            kept = all((target / part).stat().st_ino == inode for part, inode in finished.items())
        else:
            again, kept = 0, True
        left = [p.name for p in ROOT.glob(f".part-{name}-*")]
        files = sorted(p.name for p in target.iterdir()) if target.exists() else []
        digest = Artifact.open(target).manifest.digest if target.exists() and whole(target) else None
        print(json.dumps({"status": status, "finished": len(finished), "fine": absent or good, "again": again,
                          "kept": kept, "digest": digest, "files": files, "left": left}), flush=True)
        return status

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    (ROOT / "warm").mkdir()
    write(ROOT / "warm" / "up")  # what is imported late is imported here, not in every child
    point = 0
    while story(f"at-{point}", point):
        point += 1
    random.seed(int(sys.argv[2]))
    for index in range(15):
        story(f"after-{index}", None, random.uniform(0.0, 0.03))
""")


def test_a_writer_killed_at_any_point_leaves_all_or_nothing_and_the_next_one_finishes_its_work(tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "PATH": "",
    }  # no git: it is slow
    told = subprocess.run(
        [sys.executable, str(script), str(root), "0"], capture_output=True, text=True, check=True, env=environment
    )
    stories = [json.loads(line) for line in told.stdout.splitlines()]
    killed = [story for story in stories if story["status"] == 9]
    assert len(killed) > 20
    assert {story["finished"] for story in killed} >= set(range(5))
    files = sorted(
        [f"part-{i:05d}.parquet" for i in range(4)] + ["README.md", "manifest.json", "metrics.parquet", "log.txt"]
    )
    for story in stories:
        assert story["fine"] and story["again"] == 0 and story["kept"], story
        assert story["files"] == files and story["left"] == [], story
    assert len({story["digest"] for story in stories}) == 1


def test_a_manifest_says_what_it_is_after_a_round_trip(tmp_path):
    made = make(tmp_path / "x")
    assert Manifest.model_validate_json(made.manifest.model_dump_json()) == made.manifest
    record = made.record()
    assert (record.path, record.digest, record.fingerprint) == (str(made.path), made.manifest.digest, FINGERPRINT)
