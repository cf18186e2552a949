"""Prefect's temporary server is there before a run asks for it, once, and only where there is none."""

import os
import subprocess
import sys

BEGUN = """
import sys
from flows import temporary
answers = temporary.begin()
begun = "prefect.server.api.server" in sys.modules
answers()
from prefect import get_client
with get_client(sync_client=True) as client:
    print(begun, client.api_healthcheck(), client.api_url)
import psutil
print(len([one for one in psutil.Process().children(recursive=True) if "uvicorn" in " ".join(one.cmdline())]))
"""


def told(**more):
    done = subprocess.run(
        [sys.executable, "-c", BEGUN], capture_output=True, text=True, check=False, timeout=120, env=os.environ | more
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_server_is_started_where_there_is_none_and_prefect_takes_it():
    begun, error, url, servers = told()
    assert (begun, error, servers) == ("True", "None", "1")
    assert url.startswith("http://127.0.0.1:")


def test_none_is_started_beside_another(server):
    begun, error, url, servers = told(PREFECT_API_URL=server)
    assert (begun, error, servers) == ("False", "None", "0")
    assert url.rstrip("/") == server.rstrip("/")
