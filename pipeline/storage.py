"""Object storage: a root that is a URL (`s3://`, `gs://`, `file://`), by fsspec.

Work goes on in a mirror on this machine, since models and engines read files. What is committed there is copied to
the URL before it gets its name here, `manifest.json` last and only if none is there yet: a rename is not atomic on
object storage, one object is. So whoever finds a manifest finds all that it names. What is not here yet is fetched
when it is asked for, the manifest first and weights (`*.safetensors`) not before somebody reads them.

    ~/.cache/rlhf/mirrors/s3/BUCKET/PREFIX/...         the mirror of s3://BUCKET/PREFIX (RLHF_MIRRORS: elsewhere)

A machine can lose its mirror at any time, and another one goes on. Whose credentials, which endpoint: fsspec's and
the cloud's own environment variables (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...).
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import BusyError, InputError, PipelineError, StorageError

MANIFEST = "manifest.json"
"""Written last, read first: the name of every artifact's certificate."""
WEIGHTS = ".safetensors"
"""How files end that are fetched only when they are read."""
MIRRORS = "RLHF_MIRRORS"
"""Environment variable with the directory of the mirrors."""
PACKAGES = {
    "s3": "'rlhf-stages[s3]'", "s3a": "'rlhf-stages[s3]'",
    "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
}  # fmt: skip
"""Scheme of a URL -> what pip is told to install for it, where it is not fsspec's own."""
SCRATCH = ".part-"
"""How the names begin of what is not finished."""
_LINK = ".link"


def place(text: str | Path) -> Path:
    """The path that a person named: of a URL, its mirror. Raises `InputError` for a URL that no library reads."""
    scheme, separator, rest = str(text).partition("://")
    if not separator:
        return Path(text)
    from fsspec import available_protocols

    if scheme not in available_protocols() or not rest.strip("/"):
        raise InputError(f"cannot read {text!r}", do="write a path, or a URL such as s3://BUCKET/runs")
    return _mirrors() / scheme / rest.strip("/")


def url_of(path: Path) -> str | None:
    """What a path mirrors; None where it is only here."""
    absolute = path.absolute()
    if not absolute.is_relative_to(_mirrors()):
        return None
    scheme, *rest = absolute.relative_to(_mirrors()).parts
    return f"{scheme}://{'/' if scheme == 'file' else ''}{'/'.join(rest)}"


def there(path: Path) -> bool:
    """Whether something is at `path`: here already, or fetched now, an artifact without its weights."""
    return path.exists() or _fetched(path)


def _fetched(target: Path) -> bool:
    with _reached(target) as found:
        if found is None:
            return False
        files, base = found
        try:
            manifest = files.cat_file(f"{base}/{MANIFEST}")
        except FileNotFoundError:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{target.name}-", dir=target.parent))
        try:
            for name in _names(files, base):
                if name != MANIFEST and not name.endswith(WEIGHTS):
                    _download(files, f"{base}/{name}", scratch / name)
            (scratch / MANIFEST).write_bytes(manifest)
            if not target.exists():  # another process was faster
                scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return True


def complete(directory: Path, names: Iterable[str]) -> None:
    """Get those of an artifact's files that are not here: its weights."""
    missing = [name for name in names if not (directory / name).exists()]
    if not missing:
        return
    with _reached(directory) as found:
        if found is not None:
            files, base = found
            for name in missing:
                if files.exists(f"{base}/{name}"):
                    _download(files, f"{base}/{name}", directory / name)


def publish(directory: Path, target: Path, names: Iterable[str] | None = None) -> None:
    """Copy a whole artifact from `directory` to what `target` mirrors, or these files of it; the manifest last.

    Raises `BusyError` where another process has put one there meanwhile.
    """
    with _reached(target) as found:
        if found is None:
            return
        files, base = found
        inside = names or (path.relative_to(directory).as_posix() for path in directory.rglob("*"))
        for name in sorted(inside):
            if name != MANIFEST and (directory / name).is_file():
                files.put_file(str(directory / name), f"{base}/{name}")
        try:
            files.pipe_file(f"{base}/{MANIFEST}", (directory / MANIFEST).read_bytes(), mode="create")
        except FileExistsError as error:
            raise BusyError.second(url_of(target)) from error


def bring(folder: Path) -> None:
    """Get everything below `folder` that is not here yet, but for weights; files outside artifacts always."""
    with _reached(folder) as found:
        if found is None:
            return
        files, base = found
        names = _names(files, base)
        artifacts = {inside for inside, _, name in (name.rpartition("/") for name in names) if name == MANIFEST}
        for inside in sorted(artifacts):
            there(folder / inside)
        for name in names:
            if any(str(parent) in artifacts for parent in Path(name).parents):
                continue
            if name.endswith(_LINK):
                _link(folder / name.removesuffix(_LINK), files.cat_file(f"{base}/{name}").decode())
            else:
                _download(files, f"{base}/{name}", folder / name)


def carry(folder: Path) -> None:
    """Copy the files and links of a run that are in no artifact: what it is, and what was drawn of it."""
    with _reached(folder) as found:
        if found is None:
            return
        files, base = found
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_symlink():
                files.pipe_file(f"{base}/{path.name}{_LINK}", str(path.readlink()).encode())
            elif path.is_file():
                files.put_file(str(path), f"{base}/{path.name}")


def put(path: Path) -> None:
    """Copy one file."""
    with _reached(path) as found:
        if found is not None:
            files, base = found
            files.put_file(str(path), base)


def at_hand(text: str | Path) -> Path:
    """The path that a person named, with what it mirrors."""
    path = place(text)
    bring(path)
    return path


def moved(source: Path, target: Path) -> None:
    """Follow an artifact, whole, that was moved in the mirror: there it is copied first."""
    publish(target, target)
    removed(source)


def removed(path: Path) -> None:
    """Follow a file or directory that was deleted in the mirror; of an artifact the manifest goes first."""
    with _reached(path) as found:
        if found is None:
            return
        files, base = found
        for name in (f"{base}/{MANIFEST}", base):
            if files.exists(name):
                files.rm(name, recursive=True)


def _mirrors() -> Path:
    given = os.environ.get(MIRRORS)
    return Path(given) if given else Path.home() / ".cache" / "rlhf" / "mirrors"


@contextmanager
def _reached(path: Path) -> Iterator[tuple[Any, str] | None]:
    """The file system of what a path mirrors, and its path there; None where it mirrors nothing."""
    url = url_of(path)
    if url is None:
        yield None
        return
    from fsspec import url_to_fs

    try:
        files, base = url_to_fs(url, **({"auto_mkdir": True} if url.startswith("file:") else {}))
        files.invalidate_cache()
        yield files, base
    except PipelineError:
        raise
    except ImportError as error:
        package = PACKAGES.get(url.partition("://")[0])
        do = f"pip install {package}" if package else "install what it names; or take another kind of storage"
        raise StorageError(f"cannot reach it: {error}", url, do) from error
    except Exception as error:  # every cloud has errors of its own
        raise StorageError(
            f"cannot reach it: {str(error).strip() or type(error).__name__}", url,
            "check address and credentials, then run again: what is done here is kept",
        ) from error  # fmt: skip


def _names(files: Any, base: str) -> list[str]:
    """All files below a place, by their path inside it."""
    return sorted(name[len(base) :].lstrip("/") for name in files.find(base))


def _download(files: Any, source: str, target: Path) -> None:
    """Get one file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{SCRATCH}{os.getpid()}-{target.name}")
    try:
        files.get_file(source, str(scratch))
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _link(path: Path, target: str) -> None:
    """Have a link point there, in one step."""
    scratch = path.with_name(f"{SCRATCH}{os.getpid()}-{path.name}")
    scratch.symlink_to(target)
    scratch.replace(path)
