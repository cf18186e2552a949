"""Run the arms of a claim over seeds, and keep every number that they measure.

A run of an arm is an ordinary run, `CLAIM-ARM-SEED`: killed, it goes on where it was. What is stored already, of the
same resolved experiment, is not run again. All arms of a seed share what lies below `WORLD-SEED`: data and SFT policy.
Beside each number stands the commit of the code when the runs were begun, `-dirty` where that code was changed.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path

import polars as pl

from flows.claims import CLAIMS, SCHEMA, Claim
from pipeline import lifeline
from pipeline.catalog import catalog
from pipeline.disk import flush
from pipeline.errors import ExperimentError
from pipeline.experiment import Experiment
from pipeline.inspecting.curves import by_iteration

DIGITS = 16
"""Hex digits of an experiment's digest."""
CODE = (":/pipeline", ":/stages", ":(top,glob)flows/*.py")
"""What computes numbers, as git names paths."""


def prepared(claim: Claim, arm: str, seed: int) -> tuple[Path, list[str], Experiment]:
    """The world's file, what to change in it, and the experiment that this makes. Raises `ExperimentError`."""
    how, worlds = claim.arms[arm], claim.folder / "worlds"
    world = how.experiment or claim.experiment
    path = worlds / f"{world}.toml"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in worlds.glob("*.toml")))
        raise ExperimentError(
            f"arm {arm!r}: no world is called {world!r}; there are: {there}", str(claim.folder / f"{claim.name}.toml")
        )
    changes = [f"seed={seed}", f'base="{world}-{seed}"', *how.changes]
    return path, changes, Experiment.load(path, changes, how.recipe, f"{claim.name}-{arm}-{seed}")


def digest(experiment: Experiment) -> str:
    """Name of what a run computes: not of how it is run, nor of settings that are as they are when nobody says."""
    said = experiment.model_dump(mode="json", exclude={"resources"}, exclude_defaults=True)
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=DIGITS // 2).hexdigest()


def stored(claim: Claim, numbers: pl.DataFrame) -> set[tuple[str, int]]:
    """Arms and seeds whose results are of the experiment as the files describe it now."""
    found = numbers.select("arm", "seed", "experiment").unique().rows()
    return {(arm, seed) for arm, seed, of in found if arm in claim.arms and digest(prepared(claim, arm, seed)[2]) == of}


def run(claim: Claim, seeds: int, root: Path, jobs: int, say: Callable[[str], None]) -> None:
    """Run what is not stored, seed by seed and `jobs` arms at a time; store each run's numbers as soon as it is done.

    Each job is a process with its share of the cores. Where a run fails no other is begun, and its error is raised.
    """
    from flows.execute import check

    code = commit()  # the runs take long, and the checkout may be another by their end
    wanted = [(arm, seed) for seed in range(seeds) for arm in claim.arms]
    for arm, seed in wanted:
        check(prepared(claim, arm, seed)[2])  # before hours are spent on the others
    there = stored(claim, claim.numbers())
    for arm, seed in wanted:
        if (arm, seed) in there:
            say(f"{claim.name}: {arm}, seed {seed}: stored")
    missing = [one for one in wanted if one not in there]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    own = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, max(1, len(missing))), own, _end_with_parent) as pool:
        running = {pool.submit(_run_arm, claim, arm, seed, root): (arm, seed) for arm, seed in missing}
        try:
            for done in as_completed(running):
                arm, seed = running[done]
                store(claim, arm, seed, done.result().with_columns(commit=pl.lit(code)))
                say(f"{claim.name}: {arm}, seed {seed}: {claim.arms[arm].doc}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_arm(claim: Claim, arm: str, seed: int, root: Path) -> pl.DataFrame:
    """Run an arm in a process of a pool, and return its numbers."""
    from flows.execute import run_experiment

    path, changes, experiment = prepared(claim, arm, seed)
    run_experiment(str(path), claim.arms[arm].recipe, experiment.name, changes, str(root))
    return measured(root / experiment.name, experiment)


def _end_with_parent() -> None:
    """In a process of a pool: end when the one that started it does, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101  # for the type checker
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(parent: int) -> None:
    wait([parent])
    lifeline.end_what_was_started()
    os.kill(os.getpid(), signal.SIGKILL)


def measured(folder: Path, experiment: Experiment) -> pl.DataFrame:
    """Every number of a run by iteration."""
    entries = [one for one in catalog([folder]) if one.run == folder.name]
    return by_iteration(entries).with_columns(experiment=pl.lit(digest(experiment)))


def store(claim: Claim, arm: str, seed: int, numbers: pl.DataFrame) -> None:
    """Put the numbers of a run into the claim's file, in place of older ones of the same arm and seed."""
    new = numbers.with_columns(arm=pl.lit(arm), seed=pl.lit(seed)).select(
        pl.col(column).cast(kind) for column, kind in SCHEMA.items()
    )
    others = claim.numbers().filter(~((pl.col("arm") == arm) & (pl.col("seed") == seed)))
    whole = pl.concat([others, new]).sort("seed", "arm", "phase", "iteration", "kind", "name")
    claim.results.parent.mkdir(parents=True, exist_ok=True)
    scratch = claim.results.with_suffix(".part")
    whole.write_parquet(scratch, compression="zstd", compression_level=19)
    flush(scratch)
    scratch.replace(claim.results)


def commit() -> str:
    """Of the code, where it is a checkout; changes of anything else do not count."""
    changed = _git("status", "--porcelain", "--", *CODE)
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    command = ["git", *words]
    return subprocess.run(command, cwd=CLAIMS, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
