"""Shards of a stage on a Ray cluster: one that is there, by its address, or one here that ends with this process.

Prefect stays the orchestrator: a stage is one task, run where the flow runs; inside it the shards go to Ray's actors,
whose answers come back in order and are written and committed by the stage alone. So workers need no Prefect, and a
worker that is lost leaves nothing half-written: Ray starts another one, which does its shard from the beginning.
Every response has a seed of its own, so the rows are the same, whoever made them.

Workers open inputs by their paths: the runs lie on a file system that all machines share, or in object storage.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError, EngineError, ExperimentError, PipelineError
from pipeline.experiment import Demand, Ray
from pipeline.shards import Work

TRIES = 3
"""Times that a shard is begun before its workers' deaths are taken for its own fault."""
AHEAD = 2
"""Shards that are under way or wait, for each worker."""


class Worker:
    """Does shards in a process of its own, and keeps what it has loaded for the next one."""

    def __init__(self) -> None:
        self._number = -1
        self._work: Work[Any, Any] | None = None

    def do(self, number: int, work: Work[Any, Any], reads: Sequence[Path], piece: Any) -> Any:
        """One shard of the work that has this number."""
        if number != self._number:
            for path in reads:
                _reach(path)
            self._number, self._work = number, work
        return self._work(piece)  # type: ignore[misc]  # set with its number

    def rest(self) -> None:
        """Let go of what the last work had loaded."""
        if self._work is not None:
            self._work.rest()


def _reach(path: Path) -> None:
    """Have an artifact whole on this machine. Raises `ArtifactError` where it cannot be seen from here."""
    if not storage.there(path):
        raise ArtifactError(
            f"a worker on {os.uname().nodename} cannot see it", str(path),
            "have the runs on a file system that every machine mounts at the same place, or take a URL as --root",
        )  # fmt: skip
    Artifact.open(path).ensure_whole()


class Workers:
    """Actors that do a stage's shards; the cluster is asked for them when the first shard is there."""

    def __init__(self, resources: Ray, stage: str, hardware: str, devices: int = 1) -> None:
        """`devices` are the GPUs that one worker's model takes, where the cluster has any and no demand says more."""
        self._resources, self._stage, self._hardware, self._devices = resources, stage, hardware, devices
        self._demand = resources.demands.get(stage, Demand())
        self.processors = max(1, int(self._demand.cpus))

    def __call__(self, work: Work[Any, Any], shards: Iterable[Any], reads: Sequence[Path]) -> Iterator[Any]:
        """Yield what comes of the shards, in their order.

        Raises `ExperimentError` where Ray is missing, does not answer, or has no room for a worker; what a worker
        raised; and `EngineError` where workers die of a shard. None is left then.
        """
        left = iter(shards)
        ahead = list(islice(left, 1))
        if not ahead:
            return
        ray = _connected(self._resources.address)
        actors = _actors(ray, *self._room(ray))
        from ray.util import ActorPool

        number, shared, done, pool = next(_numbers), ray.put(work), 0, ActorPool(actors)
        try:
            for piece in chain(ahead, islice(left, AHEAD * len(actors) - 1)):
                pool.submit(lambda actor, one: actor.do.remote(number, shared, reads, one), piece)
            while pool.has_next():
                yield _told(pool, done)
                done += 1
                for piece in islice(left, 1):
                    pool.submit(lambda actor, one: actor.do.remote(number, shared, reads, one), piece)
            ray.get([actor.rest.remote() for actor in actors])
        except BaseException:
            close()  # what is under way is of no use to anybody
            raise

    def _room(self, ray: Any) -> tuple[float, float, int]:
        """CPUs and GPUs of a worker, and how many workers."""
        demand, machines = self._demand, [node["Resources"] for node in ray.nodes() if node["Alive"]]
        usable = self._hardware == "gpu" and any(machine.get("GPU", 0) for machine in machines)
        gpus = demand.gpus if demand.gpus is not None else float(self._devices * usable)
        workers = sum(_fitting(machine, {"CPU": demand.cpus, "GPU": gpus}) for machine in machines)
        if workers < 1:
            cpus_there, gpus_there = max((machine.get("CPU", 0), machine.get("GPU", 0)) for machine in machines)
            raise ExperimentError(
                f"no worker fits: one takes {demand.cpus:g} CPUs and {gpus:g} GPUs of one machine, and the largest of "
                f"{len(machines)} has {cpus_there:g} and {gpus_there:g}",
                f"resources.ray.demands.{self._stage}", "ask for less, or name a larger cluster: resources.ray.address",
            )  # fmt: skip
        return demand.cpus, gpus, min(workers, demand.workers or workers)


def _fitting(machine: Mapping[str, float], demand: Mapping[str, float]) -> int:
    """Workers that a machine has room for: one does not spread over several machines."""
    return int(min(machine.get(kind, 0.0) // need for kind, need in demand.items() if need))


_running: dict[tuple[float, float, int], list[Any]] = {}
"""Actors by what each holds and how many they are: those of one stage, kept for the next that asks for such."""

_numbers = count()


def _actors(ray: Any, cpus: float, gpus: float, workers: int) -> list[Any]:
    """Warm ones, or new ones in the place of those that another stage had."""
    wanted = (cpus, gpus, workers)
    if wanted not in _running:
        for actor in chain.from_iterable(_running.values()):
            ray.kill(actor)
        _running.clear()
        # A worker that is lost is started again as often as that happens; its shard is not.
        kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=TRIES - 1)(Worker)
        _running[wanted] = [kind.remote() for _ in range(workers)]
    return _running[wanted]


def _told(pool: Any, done: int) -> Any:
    """The next answer. Raises what the worker raised; `EngineError` where workers died of a shard."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return pool.get_next()
    except RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise
    except RayError as error:
        raise EngineError(
            f"{TRIES} workers in a row died over a shard ({type(error).__name__})",
            f"shard {done + 1} of those missing",
            "give a worker more: resources.ray.demands; Ray's logs say what ended them. What was finished is kept",
        ) from error


@cache
def _connected(address: str | None) -> Any:
    """Ray, connected. Raises `ExperimentError` where that cannot be."""
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else is to reach it: no token in the home directory
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ExperimentError(
            "launcher ray needs Ray, which is not installed", "resources.launcher", 'pip install "rlhf-stages[ray]"'
        ) from error
    try:
        _knock(address or "")
        ray.init(address=address or "local", include_dashboard=False if address is None else None,
                 log_to_driver=False, configure_logging=False)  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        raise ExperimentError(
            f"no Ray cluster answers: {error}", f"resources.ray.address = {address!r}",
            "`ray start --head` starts one; without an address one is started on this machine",
        ) from error  # fmt: skip
    return ray


def _knock(address: str) -> None:
    """Raise `OSError` where nobody listens: Ray itself would try for many minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def close() -> None:
    """Let go of all workers, and end the cluster if it is one of this process."""
    if _connected.cache_info().currsize:
        import ray

        _running.clear()
        _connected.cache_clear()
        ray.shutdown()
