"""Starting: `rlhf --help`, `rlhf stage label` to its first row, `rlhf status` on a run of 1,000 iterations.

    .venv/bin/python tests/benchmarks/start_up.py

A real run of `arithmetic`, two iterations of it, is what `label` works on; a thousand iterations are its manifests
again and again, each made of the one before. Every command is a process of its own, its start included; the middle of
several turns counts, after one that is not counted. Exit code 1 beyond a limit.
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from measuring import ROOT, WORK, rlhf, run, store, verdict

sys.path.insert(0, str(ROOT))

from pipeline.artifacts import METRICS_FILE
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.storage import MANIFEST

LIMITS = {"rlhf --help": 0.4, "rlhf stage label": 1.5, "rlhf status": 1.0}
"""Seconds."""
MADE = 2
SMALL = (f"scale.iterations={MADE}", "scale.responses=128", "data.demonstrations.count=2000", "data.held_out=")


def small_run(folder: Path) -> Path:
    """A run of few rows."""
    path = folder / "small"
    if not (path / f"{MADE - 1:04d}" / "policy" / MANIFEST).is_file():
        changes = [word for change in SMALL for word in ("--set", change)]
        rlhf("run", "arithmetic", "--recipe", "grpo", "--name", "small", "--root", folder, *changes)
    return path


def long_run(small: Path, iterations: int) -> Path:
    """The manifests and metrics of a run, as of so many iterations."""
    path = small.with_name(f"long-{iterations}")
    if (path / EXPERIMENT_FILE).is_file():
        return path
    for number in range(iterations):
        source, here = small / f"{number % MADE:04d}", path / f"{number:04d}"
        for one in source.iterdir():
            (here / one.name).mkdir(parents=True)
            told = (one / MANIFEST).read_text(encoding="utf-8")
            for distance in range(MADE):  # its own artifacts, and those of the iteration before
                given = f"{(number - distance) % MADE:04d}"
                told = told.replace(f"/small/{given}/", f"/small/{max(0, number - distance):04d}*/")
            told = told.replace("*/", "/").replace("/small/", f"/{path.name}/")
            (here / one.name / MANIFEST).write_text(told, encoding="utf-8")
            shutil.copy(one / METRICS_FILE, here / one.name)
    experiment = (small / EXPERIMENT_FILE).read_text(encoding="utf-8")
    experiment = experiment.replace(f"iterations = {MADE}", f"iterations = {iterations}")
    (path / EXPERIMENT_FILE).write_text(experiment, encoding="utf-8")
    return path


def main() -> None:
    """Prepare, measure, print, refuse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    folder = WORK / "start_up"
    folder.mkdir(parents=True, exist_ok=True)
    small = small_run(folder)
    long = long_run(small, asked.iterations)
    prompts = next(path for path in folder.glob("*/prompts") if (path / MANIFEST).is_file())
    label = ["label", "--rollouts", small / "0000" / "rollouts-0", "--prompts", prompts, "--out", folder / "labels",
             "--set", 'label={kind="verifier"}']  # fmt: skip
    commands = {
        "rlhf --help": ["--help"], "rlhf stage label": ["stage", *label], "rlhf status": ["status", long],
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(asked.turns + 1):
        for name, words in commands.items():
            shutil.rmtree(folder / "labels", ignore_errors=True)
            found[name].append(rlhf(*words).seconds)
    loaded = run([sys.executable, "-c", "import stages.label, sys; sys.exit('torch' in sys.modules)"])
    middle = {name: statistics.median(seconds[1:]) for name, seconds in found.items()}
    print(f"{'':20} {'seconds':>8} {'limit':>6}")
    for name, seconds in middle.items():
        print(f"{name:20} {seconds:8.2f} {LIMITS[name]:6.1f}")
    print(f"stages.label alone is loaded in {loaded.seconds:.2f} s, without torch")
    store("start_up", {"iterations": asked.iterations, "seconds": found})
    late = [name for name, seconds in middle.items() if seconds > LIMITS[name]]
    verdict([f"{name}: {middle[name]:.2f} s, not {LIMITS[name]}" for name in late])


if __name__ == "__main__":
    main()
