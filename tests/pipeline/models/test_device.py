"""Memory that tensors have freed: kept for the next ones, and given back when none are to come."""

import subprocess
import sys

LOOK = """
import psutil, torch
from pipeline.heaps import let_go
from pipeline.models.device import device
held = lambda: psutil.Process().memory_info().rss / 1e6
device()
before = held()
tensors = [torch.ones(2**20) for _ in range(60)]
filled = held()
del tensors
kept = held()
let_go()
print(filled - before, kept - before, held() - before)
"""


def test_freed_memory_is_kept_until_it_is_let_go():
    said = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True).stdout
    filled, kept, left = map(float, said.split())
    assert filled > 230
    assert kept > 200
    assert left < 60
