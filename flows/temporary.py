"""Prefect's temporary server, started early: it takes as long to start as what a run imports does to load."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from threading import Thread

from pipeline import heaps


def begin() -> Callable[[], None]:
    """Start the server that Prefect starts for whoever has none, and return what waits until it answers.

    Where there is a server, or none may be started, nothing is done. Where the start fails Prefect tries again itself
    when the run begins, and says why it cannot. The server ends with this process.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

    if PREFECT_API_URL.value() or not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        return lambda: None
    heaps.share()  # before there is a thread
    return _starting().join


@cache
def _starting() -> Thread:
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()  # the one of this process: Prefect finds it running

    def start() -> None:
        with suppress(Exception):
            server.start()

    starting = Thread(target=start, name="prefect server", daemon=True)
    starting.start()
    return starting
