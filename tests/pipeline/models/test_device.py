"""Memory that tensors have freed: a small model's is kept until none are to come, a large one's is given back."""

import subprocess
import sys

LOOK = """
import sys
import psutil, torch
from torch import nn
from pipeline.heaps import let_go
from pipeline.models.abreast import MOST_WEIGHTS, settle
held = lambda: psutil.Process().memory_info().rss / 1e6
settle(nn.Linear(MOST_WEIGHTS if sys.argv[1] == "large" else 3, 1, device="meta"))
before = held()
tensors = [torch.ones(2**20) for _ in range(60)]
filled = held()
del tensors
kept = held()
let_go()
print(filled - before, kept - before, held() - before)
"""


def megabytes(model):
    """Of 60 tensors: while they are there, when they are freed, and in the end."""
    words = [sys.executable, "-c", LOOK, model]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return map(float, said.split())


def test_what_a_small_model_has_freed_is_kept_until_it_is_let_go():
    filled, kept, left = megabytes("small")
    assert filled > 230
    assert kept > 200
    assert left < 60


def test_what_a_large_model_has_freed_is_given_back():
    filled, kept, _ = megabytes("large")
    assert filled > 230
    assert kept < 60
