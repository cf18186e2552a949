"""`rlhf report`: writes the page of one run or of several."""

import sys
from collections.abc import Sequence
from pathlib import Path

from flows.promotion import PROMOTED
from pipeline.catalog import find_runs
from pipeline.disk import whole_file
from pipeline.errors import ExperimentError

REPORT = "report.html"


def report(runs: Sequence[str], out: Path | None) -> None:
    """Build the page, write it, print where it lies and its size.

    Raises `ArtifactError` where there is no run, and what `write` raises.
    """
    folders = find_runs(runs)
    if not folders:
        raise ExperimentError("no run is named", do="rlhf report runs/arithmetic")
    file = write(folders, out)
    sys.stdout.write(f"{file}  {file.stat().st_size / 1e6:,.1f} MB\n")


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Build the page of these runs and write it, whole or not at all; returns its path.

    Of one run it lies in its directory, of several beside that of the first. Raises `ExperimentError` for a place that
    no file can have, `StorageError` where it cannot be written.
    """
    from pipeline.inspecting.page import build

    file = out or (folders[0] / REPORT if len(folders) == 1 else folders[0].parent / REPORT)
    if file.is_dir():
        raise ExperimentError("a directory, not a file", f"-o {file}", f"rlhf report ... -o {file / REPORT}")
    promoted = {run: str(link.readlink()) for run in folders if (link := run / PROMOTED).is_symlink()}
    text = build(folders, promoted)
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return file
