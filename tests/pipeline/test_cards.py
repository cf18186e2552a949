import json
import re

import pyarrow as pa
import pytest
import yaml
from markdown_it import MarkdownIt

from pipeline.artifacts import Artifact, Outbox
from pipeline.cards import CARD, literal, size_category
from pipeline.contracts import DOCUMENTS, LABELS, POLICY

HOSTILE = {
    "html": "<script>alert(1)</script>",
    "fence": "```\n```\n# not a title\n~~~",
    "yaml": "---\ntags: [stolen]\n---\n- a: b",
    "link": "[click](javascript:alert(1)) ![x](http://example.org/x.png)",
    "cells": "a | b \\| c ` d `` e",
    "turned": "\u202egnp.exe\u0000\u001b[31m",
}


@pytest.fixture
def made(tmp_path):
    """Makes an artifact, and reads its card: front matter and the tokens of the Markdown."""

    def make(contract=DOCUMENTS, settings=None, name="documents", stage="ingest", **inputs):
        out = Outbox(tmp_path / name, contract, stage, 3, "f" * 64, settings or {}, inputs)
        if contract is DOCUMENTS:
            rows = [{"document_id": str(n), "text": f"secret text {n}", "source": "world"} for n in range(3)]
            out.write(0, pa.Table.from_pylist(rows, schema=DOCUMENTS.schema()))
        else:
            (out.path / "config.json").write_text("{}")
        out.stats["documents/mean_length"] = 0.25
        return out.commit()

    return make


def card_of(artifact):
    text = (artifact.path / CARD).read_text("utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def parsed(body):
    return MarkdownIt("commonmark").enable("table").parse(body)


def words_of(body):
    """All text that a reader sees, and the kinds of what it is made of."""
    tokens = [inner for token in parsed(body) for inner in (token, *(token.children or ()))]
    return "\n".join(token.content for token in tokens if not token.children), {token.type for token in tokens}


def test_the_front_matter_names_the_parts_and_not_the_metrics(made):
    artifact = made()
    parts = {"config_name": "default", "data_files": "part-*.parquet", "description": artifact.manifest.digest}
    assert card_of(artifact)[0] == {
        "configs": [parts],
        "size_categories": ["n<1K"], "tags": ["rlhf", "documents"],
    }  # fmt: skip


def test_the_card_of_a_checkpoint_is_a_model_card(made):
    front, body = card_of(made(POLICY, name="policy", stage="sft"))
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rlhf", "policy"]}
    assert 'AutoModelForCausalLM.from_pretrained("policy")' in body
    assert "## Columns" not in body


def test_counts_are_those_of_the_manifest(made):
    artifact = made()
    size = next(iter(artifact.manifest.files.values())).bytes
    assert f"3 rows, 1 file, {size:,} bytes. The key is `document_id`." in card_of(artifact)[1]


def test_columns_have_type_unit_null_and_meaning_and_absent_ones_are_left_out(tmp_path):
    out = Outbox(tmp_path / "labels", LABELS, "label", 1, "f" * 64, {}, {})
    row = {field.name: None for field in LABELS.fields}
    row |= {"prompt_id": "a", "sample": 0, "reward": 1.0, "keep": True}
    out.write(0, pa.Table.from_pylist([row], schema=LABELS.schema()))
    body = card_of(out.commit())[1]
    assert "| `reward` | `float` | reward | no | what the labeler said, before any shaping |" in body
    assert "| `vote_share` | `float` | fraction | yes |" in body
    assert body.count("\n| `") == len(LABELS.fields) + 2  # and two statistics
    assert "Rows with the same `prompt_id` are a group" in body


def test_no_text_of_a_row_is_on_the_card(made):
    artifact = made()
    assert "secret text" not in (artifact.path / CARD).read_text()


def test_parents_stand_there_with_their_digests_and_without_the_place_of_this_machine(made, tmp_path):
    parent = made()
    child = made(name="child", texts=[parent.record()], files=[])
    body = card_of(child)[1]
    assert f"- `texts`: `{'/'.join(parent.path.parts[-3:])}`, digest `{parent.manifest.digest}`" in body
    assert str(tmp_path) not in body


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_stay_text(made, name):
    hostile = HOSTILE[name]
    plain_front, plain = card_of(made(settings={"a": "harmless"}, name="harmless"))
    front, body = card_of(made(settings={"a": hostile, "b": {hostile: [hostile]}}, name="hostile"))
    assert front == plain_front
    kinds = words_of(body)[1]
    assert [token.type for token in parsed(body)] == [token.type for token in parsed(plain)]
    assert kinds == words_of(plain)[1]
    settings = next(token for token in parsed(body) if token.type == "fence" and token.info == "json")
    assert json.loads(settings.content) == {"a": hostile, "b": {hostile: [hostile]}}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_paths_and_names_stay_text(made, name):
    hostile = HOSTILE[name]
    record = made().record().model_copy(update={"path": f"runs/{hostile}"})
    text, kinds = words_of(card_of(made(name="child", texts=[record]))[1])
    assert kinds.isdisjoint({"html_inline", "html_block", "link_open", "image"})
    assert hostile.rpartition("/")[2].partition("\0")[0].partition("\n")[0] in text


@pytest.mark.parametrize("text", [*HOSTILE.values(), "plain", " padded ", "", "a_b_c *d*", "half \ud800"])
def test_a_literal_reads_as_it_is_in_a_cell(text):
    tokens = parsed(f"| a | b |\n| --- | --- |\n| {literal(text)} | end |\n")
    cells = [token for token in tokens if token.type == "inline"][2:]
    shown = "".join(child.content for child in cells[0].children)
    assert {child.type for child in cells[0].children} <= {"text", "text_special", "code_inline"}
    assert shown == re.sub("[\0\x1b\ud800]", "\ufffd", text)
    assert cells[1].content == "end"


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (12_345, "10K<n<100K"), (10**6, "1M<n<10M"), (10**11, "1B<n<10B")],
)
def test_size_categories_are_those_of_the_hub(rows, category):
    assert size_category(rows) == category


def test_the_card_is_part_of_no_name(made):
    one, other = made(name="one"), made(name="other")
    assert (one.path / CARD).read_text() != (other.path / CARD).read_text()  # the name of the folder
    assert one.manifest.digest == other.manifest.digest
    assert CARD not in one.manifest.files
    (one.path / CARD).write_text("a person wrote something better")
    assert one.faults() == []


def test_the_card_of_a_checkpoint_from_elsewhere_is_neither_touched_nor_left_out_of_its_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / CARD).write_text("theirs")
    before = Artifact.open(tmp_path, POLICY).manifest
    assert CARD in before.files
    (tmp_path / CARD).write_text("theirs, changed")
    assert Artifact.open(tmp_path, POLICY).manifest.digest != before.digest
    assert (tmp_path / CARD).read_text() == "theirs, changed"
