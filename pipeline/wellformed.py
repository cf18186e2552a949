"""Responses that cannot be what a sampler wrote: their tokens, numbers and ends do not fit together."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from pipeline import ragged


def malformed(part: pa.Table) -> Bool[np.ndarray, " B"]:
    """Mark the rows of a rollouts part that are malformed; of its columns, response_tokens and finish must be there.

    A row is when it has no tokens, log-probabilities of another number, an end token that is not its last, or a
    `finish` of `stop` without an end token at the end, or another one with it. The part's metadata names the end
    tokens; where it does not (responses adopted from elsewhere), ends are not looked at.
    """
    tokens = part["response_tokens"].combine_chunks()
    counts = ragged.lengths(tokens)
    bad: Bool[np.ndarray, " B"] = counts == 0
    if "sampler_logprobs" in part.column_names:
        known = pc.is_valid(part["sampler_logprobs"]).to_numpy()
        bad |= known & (ragged.lengths(part["sampler_logprobs"]) != counts)
    named = (part.schema.metadata or {}).get(b"end_tokens")
    if named is None:
        return bad
    ends = np.isin(tokens.flatten().to_numpy(), np.array(named.decode().split(","), dtype=np.int64))
    row = np.repeat(np.arange(len(counts)), counts)
    inside = np.bincount(row[ends], minlength=len(counts))
    last = np.zeros(len(counts), dtype=bool)
    last[counts > 0] = ends[np.cumsum(counts)[counts > 0] - 1]
    stopped = pc.equal(part["finish"], "stop").to_numpy()
    bad |= (inside > last) | (stopped != last)
    return bad
