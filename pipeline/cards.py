"""Dataset cards: the README.md of an artifact, so that its directory can be published and loaded as it lies.

A card is made from the manifest and the contract and from nothing else: no model output and no value of a row is in
it. Settings, paths and commands are somebody's text, so they stand where nothing of them is markup: in a JSON block, in
which every character beyond ASCII is escaped, or as a literal. The front matter holds words of ours only.

`datasets.load_dataset(FOLDER)` reads the rows because the front matter names the parts: metrics.parquet, which lies
beside them, is another table. Its cache knows a folder by its name and by the front matter alone (datasets 5.2), so
that 0001/labels-0 would be answered with the rows of 0000/labels-0: the digest in `description` keeps them apart.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.contracts import Contract

CARD = "README.md"
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
"""The Hub's words for numbers of rows: below 10^3, below 10^4, ..."""
TASKS = {"policy": "text-generation", "reward_model": "text-classification", "critic": "token-classification"}
"""The Hub's words for what a checkpoint is loaded for."""
_PLAIN = re.compile(r"[\w .,:;/+=#@%()\[\]{}<>\"'~*!?&^$-]+", re.ASCII)


def card(manifest: Mapping[str, Any], contract: Contract, schema: pa.Schema | None, folder: str) -> str:
    """The text of README.md for an artifact called `folder`: its manifest as in manifest.json, its parts' schema.

    A checkpoint has no schema.
    """
    blocks = [
        *_front_matter(manifest, contract),
        f"# {contract.name}",
        contract.doc,
        *_counts(manifest, contract),
        *(_columns(contract, schema) if schema is not None else ()),
        *_how_to_load(contract, folder),
        "## How it was made",
        *_making(manifest),
        "Settings:",
        _json(manifest["settings"]),
        "Made of:",
        "\n".join(_parents(manifest["inputs"])) or "nothing: it begins here.",
        *_statistics(manifest["stats"]),
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(manifest: Mapping[str, Any], contract: Contract) -> Iterator[str]:
    lines = ["---"]
    if contract.is_table:
        lines += ["configs:", "- config_name: default", '  data_files: "part-*.parquet"']
        lines += [f"  description: {manifest['digest']}"]
        lines += ["size_categories:", f"- {size_category(rows_of(manifest))}"]
    else:
        lines += ["library_name: transformers", f"pipeline_tag: {TASKS[contract.name]}"]
    yield "\n".join([*lines, "tags:", "- rlhf", f"- {contract.name}", "---"])


def size_category(rows: int) -> str:
    """The Hub's word for a number of rows."""
    return SIZES[min(max(len(str(rows)) - 3, 0), len(SIZES) - 1)]


def rows_of(manifest: Mapping[str, Any]) -> int:
    """Rows of all parts."""
    return sum(file["rows"] or 0 for file in manifest["files"].values())


def _counts(manifest: Mapping[str, Any], contract: Contract) -> Iterator[str]:
    files = manifest["files"]
    parts = f"{len(files):,} file{'s' * (len(files) != 1)}, {sum(file['bytes'] for file in files.values()):,} bytes"
    if not contract.is_table:
        yield parts + "."
        return
    told = f"{rows_of(manifest):,} rows, {parts}."
    if contract.key:
        told += f" The key is {', '.join(map(literal, contract.key))}."
    if contract.group is not None:
        told += f" Rows with the same {literal(contract.group)} are a group: they stand together, in one file."
    yield told


def _columns(contract: Contract, schema: pa.Schema) -> Iterator[str]:
    yield "## Columns"
    lines = ["| column | type | unit | null | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in contract.fields:
        if field.name in schema.names:
            cells = (
                literal(field.name),
                literal(str(field.type)),
                field.unit,
                "yes" if field.null else "no",
                field.doc,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    yield "\n".join(lines)
    about = {
        key.decode("utf-8", "replace"): value.decode("utf-8", "replace")
        for key, value in sorted((schema.metadata or {}).items())
        if key not in (b"contract", b"contract_version", b"ARROW:schema")
    }
    if about:
        yield "The files themselves say, as Parquet metadata:"
        yield _json(about)


def _how_to_load(contract: Contract, folder: str) -> Iterator[str]:
    yield "## How to load it"
    if not contract.is_table:
        loader = {"policy": "AutoModelForCausalLM", "reward_model": "AutoModelForSequenceClassification"}
        name = loader.get(contract.name, "AutoModelForTokenClassification")
        yield _python(
            f"from transformers import {name}, AutoTokenizer", "",
            f"model = {name}.from_pretrained({json.dumps(folder)})",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})",
        )  # fmt: skip
        return
    parts, whole = json.dumps(f"{folder}/part-*.parquet"), json.dumps(folder)
    yield _python("import polars as pl", "", f"rows = pl.read_parquet({parts})")
    yield _python("import duckdb", "", f"rows = duckdb.read_parquet({parts})")
    yield _python(
        "from pathlib import Path", "", "import pandas as pd", "",
        f'rows = pd.concat(map(pd.read_parquet, sorted(Path({whole}).glob("part-*.parquet"))), ignore_index=True)',
    )  # fmt: skip
    yield _python("from datasets import load_dataset", "", f'rows = load_dataset({whole}, split="train")')


def _making(manifest: Mapping[str, Any]) -> Iterator[str]:
    made = manifest["made"]
    lines = [f"- stage {literal(manifest['stage'])}, version {manifest['version']}; contract version "
             f"{manifest['contract']}"]  # fmt: skip
    if "time" in made:
        lines.append(f"- at {literal(made['time'])}")
    if commit := (made.get("git") or {}).get("commit"):
        dirty = ", with changes that were not committed" if made["git"].get("dirty") else ""
        lines.append(f"- by commit {literal(commit)}{dirty}")
    if made.get("command"):
        lines.append(f"- with {literal(_without_place(made['command']))}")
    if made.get("versions"):
        told = ", ".join(f"{name} {version}" for name, version in sorted(made["versions"].items()))
        lines.append(f"- Python {literal(made.get('python', '?'))}, {literal(told)}")
    lines.append(f"- fingerprint (names the computation) `{manifest['fingerprint']}`")
    lines.append(f"- digest (names the bytes) `{manifest['digest']}`")
    yield "\n".join(lines)
    yield "`manifest.json` says all of this to programs, `metrics.parquet` and `log.txt` say how the making went."


def _without_place(command: str) -> str:
    """The command without the directories of the program: they tell of one machine."""
    try:
        program, *words = shlex.split(command)
    except ValueError:
        return command
    return shlex.join([Path(program).name, *words])


def _parents(inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    for name, records in inputs.items():
        for record in records:
            place = "/".join(Path(record["path"]).parts[-3:])
            yield f"- {literal(name)}: {literal(place)}, digest {literal(record['digest'])}"


def _statistics(stats: Mapping[str, float]) -> Iterator[str]:
    if stats:
        yield "## Statistics"
        rows = (f"| {literal(name)} | {_number(value)} |" for name, value in sorted(stats.items()))
        yield "\n".join(["| name | value |", "| --- | --- |", *rows])


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.6g}"


def literal(text: str) -> str:
    """Text as it is, in running text or in a cell, whatever is in it.

    Plain text becomes code. In anything else each character that is no letter or digit becomes a numeric reference,
    which is never read as markup (CommonMark 0.31, section 2.5).
    """
    if _PLAIN.fullmatch(text) and text == text.strip():
        return f"`{text}`"
    return "".join(char if char.isascii() and char.isalnum() else f"&#{ord(char)};" for char in text)


def _json(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=2, sort_keys=True)}\n```"


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
