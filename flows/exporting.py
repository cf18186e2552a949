"""`rlhf export PATH --to verl|trl --out FILE`: a dataset as the rows that others read."""

import sys
from pathlib import Path

from pipeline.artifacts import Artifact
from pipeline.errors import ExperimentError
from pipeline.exchange import SHAPES, SUFFIXES, exported, write


def export(path: Path, to: str, out: Path) -> None:
    """Write the file; say what is in it, what was left out and why. Raises `ExperimentError`; overwrites nothing."""
    if to not in SHAPES:
        raise ExperimentError(f"--to {to}: nobody's rows are known by this name", do=f"--to {' or --to '.join(SHAPES)}")
    if out.suffix not in SUFFIXES:
        raise ExperimentError(
            f"cannot write {out.suffix or 'a file without a suffix'}", str(out), f"end it with {' or '.join(SUFFIXES)}"
        )
    if out.exists():
        raise ExperimentError("something is there already", str(out), "name another file, or delete it")
    artifact = Artifact.open(path)
    made = exported(artifact, to)
    count = write(made, out)
    left_out = [f"{times:,} {why}" for why, times in made.left_out.items() if times]
    if not count:
        raise ExperimentError(f"no row can be written; left out: {'; '.join(left_out)}", str(path))
    lines = [f"{count:,} rows for {to} in {out}", *(f"left out: {line}" for line in left_out), *made.remarks]
    sys.stdout.write("\n".join(lines) + "\n")
