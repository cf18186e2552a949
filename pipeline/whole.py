"""A file for people or for others: in the end it is there as a whole, or nothing is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.artifacts import flush, storage_error


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
