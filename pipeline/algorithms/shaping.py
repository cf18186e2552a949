"""Shape pieces: what is added to the reward of each token before credit is given. Each returns a new array."""

from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from pipeline.algorithms.shelf import Shelf


def on_last_token(rewards: Float[np.ndarray, " B"], mask: Bool[np.ndarray, "B T"]) -> Float[np.ndarray, "B T"]:
    """Return token rewards with each response's reward on its last token and 0 elsewhere; empty rows stay 0.

    The last generated token carries the reward whether or not it ends the response, as in verl b178a3cd and OpenRLHF
    3c3be623. TRL's PPO (f2cd5771) puts it one position further where that fits, and has a value there.
    """
    placed = np.zeros(mask.shape, rewards.dtype)
    if mask.shape[1]:
        last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
        rows = np.flatnonzero(mask[np.arange(len(mask)), last])
        placed[rows, last[rows]] = rewards[rows]
    return placed


def kl_penalty(
    rewards: Float[np.ndarray, "B T"],
    old_logprobs: Float[np.ndarray, "B T"],
    ref_logprobs: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    coef: float,
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> Float[np.ndarray, "B T"]:
    """Take `coef` times the estimated divergence from the reference off the reward of every token, the last included.

        r_t <- r_t - coef * k(d_t),   d_t = log pi_old(a_t) - log pi_ref(a_t)   [nat]
        k1 = d      k2 = d^2 / 2      k3 = exp(-d) + d - 1

    k1 summed over a response estimates the divergence without bias and is what InstructGPT puts into the reward
    (arXiv:2203.02155, eq. 2). d is bounded below at -20 in k3, against overflow.

    Being part of the reward it is in all that is made of it: the baseline of `leave_one_out`, as in RLOO's paper, verl
    b178a3cd and TRL f2cd5771, and the sum over later tokens of `reward_to_go`, as in REINFORCE++ (arXiv:2501.03262v9,
    eq. 4). OpenRLHF 3c3be623 keeps it out of RLOO's baseline; NeMo-RL 7ea279ab and ReMax's code (536ba49c) count the
    token's own term alone.
    """
    d = old_logprobs - ref_logprobs
    if estimator == "k2":
        d = d**2 / 2
    elif estimator == "k3":
        d = np.maximum(d, -20)
        d = np.expm1(-d) + d
    return np.where(mask, rewards - coef * d, rewards).astype(rewards.dtype)


def overlong_penalty(
    rewards: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    limit: Annotated[int, Field(ge=1)],
    buffer: Annotated[int, Field(ge=1)],
) -> Float[np.ndarray, "B T"]:
    """Add a penalty for length to the reward of the last token: 0, then a slope over `buffer` tokens, then -1.

        0                                |y| <= limit - buffer
        ((limit - buffer) - |y|) / buffer    between
        -1                               |y| > limit

    Soft overlong punishment of DAPO (arXiv:2503.14476, eq. 13). |y| counts response tokens, the end token included.
    OpenRLHF 3c3be623 and TRL f2cd5771 agree; verl b178a3cd goes on falling beyond `limit`, where no response ends.
    """
    lengths = mask.sum(axis=1)
    penalty = np.clip((limit - buffer - lengths) / buffer, -1.0, 0.0)
    shaped: Float[np.ndarray, "B T"] = rewards + on_last_token(penalty, mask).astype(rewards.dtype)
    return shaped


def missing_end_penalty(
    rewards: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    finished: Bool[np.ndarray, " B"],
    *,
    penalty: Annotated[float, Field(ge=0)],
) -> Float[np.ndarray, "B T"]:
    """Take `penalty` off the reward of the last token of a response that was cut before it ended.

        r_T <- r_T - penalty                                               where the response is not finished

    TRL f2cd5771 (PPO, `missing_eos_penalty`). lm-human-preferences cbfd210b gives such a response -1 instead of its
    score.
    """
    shaped: Float[np.ndarray, "B T"] = rewards - on_last_token(np.where(finished, 0.0, penalty), mask).astype(
        rewards.dtype
    )
    return shaped


SHAPES: Shelf[Float[np.ndarray, "B T"]] = Shelf("shape", [kl_penalty, overlong_penalty, missing_end_penalty])
