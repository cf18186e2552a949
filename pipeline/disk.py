"""What is on the disk: files that are whole or absent, files that are what they were, and what a failing disk means."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

from pipeline.errors import ArtifactError, StorageError

Made = TypeVar("Made")

FileIdentity = tuple[str, int, int, int, int]
"""A file as it is now: whoever writes to it, or puts another in its place, changes this."""


def identity(path: Path) -> FileIdentity:
    """Name, device, inode, size and time of change: the same after a directory above it was renamed."""
    now = path.stat()
    return (path.name, now.st_dev, now.st_ino, now.st_size, now.st_ctime_ns)


class Unchanged(Generic[Made]):
    """What `make` reads in a file, once while the file is what it was; of the last `most` files."""

    def __init__(self, make: Callable[[Path], Made], most: int) -> None:
        self._make, self._most = make, most
        self._kept: dict[FileIdentity, Made] = {}
        self._evicting = Lock()

    def __call__(self, path: Path) -> Made:
        """What is in the file now. Raises `OSError`, and what `make` raises."""
        key = identity(path)
        with suppress(KeyError):
            return self._kept[key]
        made = self._make(path)
        self._keep(key, made)
        return made

    def __contains__(self, path: Path) -> bool:
        """Whether it is known. Raises `OSError` where there is no file."""
        return identity(path) in self._kept

    def learn(self, path: Path, made: Made) -> None:
        """Be told what is in it by whoever has written the file."""
        self._keep(identity(path), made)

    def _keep(self, key: FileIdentity, made: Made) -> None:
        with self._evicting:
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = made


def flush(path: Path) -> None:
    """Have the file or directory on the disk itself before anything else is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a place to write to, beside `path`; when the block has ended, what was written there takes its name.

    Directories above are made. After an error, or where nothing was written, nothing is left. Raises `StorageError`
    where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.exists():
            flush(temporary)
            temporary.replace(path)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file of a checkpoint says. Raises `ArtifactError` where there is none, or something else in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"a checkpoint has a {path.name}, this one has none", str(path.parent)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"not valid JSON: {error}", str(path)) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"not a JSON object but a {type(content).__name__}", str(path))
    return content


_OF_STORAGE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG}
)
_FULL = os.strerror(errno.ENOSPC)


def storage_error(error: BaseException, target: Path) -> StorageError:
    """What a failure of the file system means for the artifact at `target`."""
    full = _is_full(error)
    free = f", {shutil.disk_usage(_existing(target)).free / 2**20:,.0f} MiB free" if full else ""
    why = "the disk is full" + free if full else getattr(error, "strerror", None) or str(error)
    return StorageError(
        f"cannot write: {why}", str(target),
        "make room (`rlhf prune RUN` deletes old weights) and run again: what was finished is kept" if full
        else "make it writable, or choose another --root or --out, and run again",
    )  # fmt: skip


def of_storage(error: BaseException) -> bool:
    """Whether the file system failed, rather than a program. Libraries in Rust say it in words only."""
    return _is_full(error) or (isinstance(error, OSError) and error.errno in _OF_STORAGE)


def _is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL in str(error)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())
