"""What the benchmarks share: environments for peers, processes whose memory is measured, results with their commit."""

import json
import os
import platform
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".benchmarks"
"""Environments of peers, models and data between two runs."""
RESULTS = Path(__file__).with_name("results")

TRL = ("torch==2.13.0", "trl==1.16.0")  # torch first: with it there, TRL asks for no other build


class Usage(NamedTuple):
    """What a process took, its start included."""

    seconds: float
    worked: float
    """Seconds of processors, of its children too."""
    gigabytes: float
    """Most memory that it had at once; its children's not counted."""


def environment(name: str, packages: Sequence[str]) -> Path:
    """The Python of an environment with these packages, put in one after the other where there is none."""
    python = WORK / name / "bin" / "python"
    if not python.exists():
        venv.create(WORK / name, with_pip=True)
        for package in packages:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *package.split()], check=True)
    return python


def run(words: Sequence[str | Path], threads: int = 2, settings: Mapping[str, str] | None = None) -> Usage:
    """Run a process to its end. What it says is shown only when it fails.

    The caller should be small: the memory of a child counts from that of the process that starts it.
    """
    there = os.environ | {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(settings or {}),
    }  # fmt: skip
    started = time.monotonic()
    with subprocess.Popen(
        [str(word) for word in words], cwd=ROOT, env=there, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        said = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(str(word) for word in words)} ended with {process.returncode}\n{said[-4000:]}")
    return Usage(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def side(python: Path, script: str, name: str, plan: Path, threads: int = 2) -> dict[str, Any]:
    """What one side of a comparison tells: `script --side NAME --plan FILE`, which leaves NAME.json beside the plan.

    Its own seconds and gigabytes stand beside what it tells.
    """
    told = plan.parent / f"{name}.json"
    told.unlink(missing_ok=True)
    usage = run([python, script, "--side", name, "--plan", plan], threads)
    found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return {**found, "process_seconds": usage.seconds, "gigabytes": usage.gigabytes}


def rlhf(*words: str | Path, threads: int = 2) -> Usage:
    """Run a command of this project."""
    return run([sys.executable, "-m", "flows.cli", *words], threads)


def where() -> dict[str, str]:
    """The machine and the commit that figures are of."""
    words = ["git", "describe", "--always", "--dirty"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in told if line.startswith("model name"))
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": said.stdout.strip(),
        "machine": f"{next(names, platform.machine())}, {os.cpu_count()} cores",
    }  # fmt: skip


def store(name: str, found: Mapping[str, Any]) -> None:
    """Keep what a benchmark found, with machine and commit, as results/NAME.json."""
    file, here = RESULTS / f"{name}.json", where()
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**here, **found}) + "\n", encoding="utf-8")
    print(f"{here['machine']}, commit {here['commit']}; kept in {file.relative_to(ROOT)}")


def verdict(missed: Sequence[str]) -> None:
    """End with exit code 1 where goals were missed, and say which."""
    for line in missed:
        print(f"missed: {line}")
    if missed:
        raise SystemExit(1)
