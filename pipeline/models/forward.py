"""Forward passes over finished responses: log-probabilities and entropies, never more than a chunk of logits at once.

Shapes: B responses, T response tokens, L prompt plus response tokens, N response tokens of all rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ContractError, ExperimentError, NumericsError

# Logits that are not hidden state times head; these families would silently get wrong log-probabilities.
LOGITS_CHANGED_BY = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class ResponseLogprobs(NamedTuple):
    """What a policy thinks of responses. Positions outside `mask` hold 0."""

    logprobs: Float[Tensor, "B T"]
    """Natural log-probability of each response token, float32."""
    mask: Bool[Tensor, "B T"]
    """True on response tokens."""
    entropies: Float[Tensor, "B T"] | None
    """Entropy of the distribution that each token was drawn from, in nats; None unless asked for."""


def response_logprobs(
    model: Any,
    prompt_tokens: Sequence[Sequence[int]],
    response_tokens: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int = 1024,
) -> ResponseLogprobs:
    """Log-probabilities of each response token given the prompt and the response before it.

        logp_t = z_t[y_t] / tau - logsumexp(z_t / tau)        z_t: logits before token t, in float32
        H_t    = logsumexp(z_t / tau) - sum_v p_t[v] z_t[v] / tau

    Must be taken at the temperature that sampled, or old and new log-probabilities are of different policies.
    The head and the softmax run on response positions only, `chunk` of them at a time; with gradients, a chunk's
    logits are computed again in the backward pass, so that at no time more than `chunk` x V of them exist.

    Raises `ContractError` for an empty prompt, `NumericsError` naming the rows whose log-probability is not finite or
    above zero, `ExperimentError` for a model whose logits are more than hidden state times head.
    """
    if changed := [name for name in LOGITS_CHANGED_BY if getattr(model.config, name, None) not in (None, 1, 1.0)]:
        raise ExperimentError(f"log-probabilities of models with {', '.join(changed)} are not supported")
    if empty := [row for row, prompt in enumerate(prompt_tokens) if not prompt]:
        raise ContractError("a response token needs a token before it", where=f"rows {empty[:5]} have empty prompts")
    head = model.get_output_embeddings()
    tokens, attended, mask, places = _batch(prompt_tokens, response_tokens, head.weight.device)
    hidden = model.base_model(
        input_ids=tokens,
        attention_mask=attended.long(),
        position_ids=torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens),
        use_cache=False,
    ).last_hidden_state
    rows, positions = places
    before, targets = hidden[rows, positions - 1], tokens[rows, positions]

    parts = [
        _of_chunk(head, before[start : start + chunk], targets[start : start + chunk], temperature, entropy)
        for start in range(0, len(targets), chunk)
    ]
    logprobs = _scatter([part[0] for part in parts], mask)
    _check(logprobs, mask)
    return ResponseLogprobs(logprobs, mask, _scatter([part[1] for part in parts], mask) if entropy else None)


def _batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"], Bool[Tensor, "B T"], tuple[Tensor, Tensor]]:
    """Right-padded tokens, their mask, the responses' mask, and (row, position) of every response token."""
    starts = torch.tensor([len(prompt) for prompt in prompts])
    counts = torch.tensor([len(response) for response in responses])
    length, width = int((starts + counts).max()), int(counts.max())
    tokens = torch.zeros(len(starts), length, dtype=torch.long)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
    attended = torch.arange(length) < (starts + counts)[:, None]
    mask = torch.arange(width) < counts[:, None]
    rows, offsets = mask.nonzero(as_tuple=True)
    places = (rows.to(device), (starts[rows] + offsets).to(device))
    return tokens.to(device), attended.to(device), mask.to(device), places


def _of_chunk(
    head: Any, hidden: Float[Tensor, "n H"], targets: Int[Tensor, " n"], temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        found: tuple[Tensor, Tensor] = checkpoint(
            _logprobs, head, hidden, targets, temperature, entropy, use_reentrant=False, preserve_rng_state=False
        )
        return found
    return _logprobs(head, hidden, targets, temperature, entropy)


def _logprobs(
    head: Any, hidden: Float[Tensor, "n H"], targets: Int[Tensor, " n"], temperature: float, entropy: bool
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    logits = head(hidden).float() / temperature
    normalizer = logits.logsumexp(dim=-1)
    logprobs = logits.gather(1, targets[:, None])[:, 0] - normalizer
    if not entropy:
        return logprobs, logprobs.detach()
    return logprobs, normalizer - ((logits - normalizer[:, None]).exp() * logits).sum(dim=-1)


def _scatter(parts: list[Tensor], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    padded = torch.zeros(mask.shape, device=mask.device)
    return padded.masked_scatter(mask, torch.cat(parts)) if parts else padded


def _check(logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> None:
    wrong = mask & ~(torch.isfinite(logprobs) & (logprobs <= 0))
    if wrong.any():
        rows = wrong.any(dim=1).nonzero()[:, 0].tolist()
        worst = float(logprobs.detach()[wrong][0])
        raise NumericsError(
            f"a log-probability is {worst}", where=f"rows {rows[:5]} of {len(mask)}", do="check the policy's tensors"
        )
