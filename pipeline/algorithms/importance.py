"""Importance pieces: weights against the mismatch between the engine that sampled and the stack that trains.

The two compute slightly different log-probabilities from the same weights, so that what was sampled is slightly
off-policy. The advantage stage multiplies the weights into the normalized credit: a policy loss is proportional to that
and is weighted, and nothing else is.
"""

from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Float64
from pydantic import Field

from pipeline.algorithms.shelf import Shelf

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are bounded here before exp, in nat."""


def token_truncated(
    old_logprobs: Float[np.ndarray, "B T"],
    sampler_logprobs: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    cap: Annotated[float, Field(ge=1)] = 2.0,
) -> Float[np.ndarray, "B T"]:
    """How much likelier a token is to the trainer than it was to the engine, but at most `cap`.

        w_t = min( pi_old(a_t) / pi_sampler(a_t) , cap )

    Truncated importance sampling (Ionides 2008, J. Comput. Graph. Stat. 17(2)): the truncation bounds the variance and
    costs some bias. Put between engine and trainer by Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training" (fengyao.notion.site/off-policy-rl). 0 on padding.
    """
    ratio = _difference(old_logprobs, sampler_logprobs, mask)
    return _capped(ratio, mask, cap).astype(old_logprobs.dtype)


def sequence_truncated(
    old_logprobs: Float[np.ndarray, "B T"],
    sampler_logprobs: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    cap: Annotated[float, Field(ge=1)] = 2.0,
) -> Float[np.ndarray, "B T"]:
    """The same for the whole response, on each of its tokens.

        w_t = min( prod_u pi_old(a_u) / pi_sampler(a_u) , cap )

    Right for responses as wholes, where `token_truncated` takes each token for itself; small differences add up over a
    long response, and its weight is then near 0 or at the cap. 0 on padding.
    """
    ratio = _difference(old_logprobs, sampler_logprobs, mask).sum(axis=1, keepdims=True)
    return _capped(np.broadcast_to(ratio, mask.shape), mask, cap).astype(old_logprobs.dtype)


def _difference(
    old_logprobs: Float[np.ndarray, "B T"], sampler_logprobs: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]
) -> Float64[np.ndarray, "B T"]:
    return np.where(mask, old_logprobs.astype(np.float64) - sampler_logprobs, 0.0)


def _capped(
    log_ratio: Float64[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], cap: float
) -> Float64[np.ndarray, "B T"]:
    ratio = np.exp(np.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return np.where(mask, np.minimum(ratio, cap), 0.0)


IMPORTANCE: Shelf[Float[np.ndarray, "B T"]] = Shelf("importance", [token_truncated, sequence_truncated])
