"""How far the policies of an iteration are from each other, on the tokens that were sampled."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Numbers = dict[str, tuple[float, str]]
"""Name -> value and unit."""


def divergence(old: pa.ListArray, ref: pa.ListArray) -> Numbers:
    """How far the policy is from the reference, on its own responses.

        d_t = old - ref;   kl/reference = mean over tokens of d_t;   kl/reference_sum = mean over responses of sum_t d_t

    Both estimate KL(policy || reference), of a token and of a whole response.
    """
    d = old.flatten().to_numpy().astype(np.float64) - ref.flatten().to_numpy()
    return {"kl/reference": (float(d.mean()), "nat"), "kl/reference_sum": (float(d.sum() / len(old)), "nat")}


def mismatch(sampler: pa.ChunkedArray, trainer: pa.ListArray) -> Numbers:
    """How far the engine's log-probabilities are from the training stack's, over tokens.

    d = sampler - trainer;   mean d estimates KL(sampler || trainer);   the ratio trainer / sampler is exp(-d)
    """
    known = pc.is_valid(sampler)
    if not pc.any(known).as_py():
        return {}
    theirs = sampler.filter(known).combine_chunks().flatten().to_numpy().astype(np.float64)
    d = theirs - trainer.filter(known.combine_chunks()).flatten().to_numpy()
    outside = (np.abs(d) > np.log(2)).mean()
    return {
        "kl/sampler": (float(d.mean()), "nat"),
        "kl/sampler_abs": (float(np.abs(d).mean()), "nat"),
        "kl/sampler_max": (float(np.abs(d).max()), "nat"),
        "kl/sampler_outside": (float(outside), "fraction"),
    }
