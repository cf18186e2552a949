"""One random stream per purpose: a seed is derived from the run's seed and the names of what it is for."""

import hashlib
import json


def derive(seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2^63) that depends on every name and on their order.

    Derived seeds make a result independent of what else drew random numbers before it: a shard that is sampled
    again after a crash gets the numbers it would have had.
    """
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
