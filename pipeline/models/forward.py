"""Forward passes over finished responses: log-probabilities, entropies, values and scores.

Never more than a chunk of logits exists at once. Rows are padded on the right; which token pads does not matter.

Shapes: B responses, T response tokens, L prompt plus response tokens, N response tokens of all rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ContractError, ExperimentError, NumericsError
from pipeline.models.checkpoint import reward_bias

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


class ResponseValues(NamedTuple):
    """What a critic expects of responses. Positions outside `mask` hold 0."""

    values: Float[Tensor, "B T"]
    """Value before each response token is chosen, float32."""
    mask: Bool[Tensor, "B T"]
    """True on response tokens."""


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
    _refuse_empty_prompts(prompt_tokens)
    head = model.get_output_embeddings()
    tokens, attended, mask, (rows, positions) = _batch(prompt_tokens, response_tokens, head.weight.device)
    hidden = _hidden(model, tokens, attended)
    before, targets = hidden[rows, positions - 1], tokens[rows, positions]

    parts = [
        _of_chunk(head, before[start : start + chunk], targets[start : start + chunk], temperature, entropy)
        for start in range(0, len(targets), chunk)
    ]
    logprobs = _scatter([part[0] for part in parts], mask)
    _check(mask & ~(torch.isfinite(logprobs) & (logprobs <= 0)), logprobs, "a log-probability", "the policy")
    return ResponseLogprobs(logprobs, mask, _scatter([part[1] for part in parts], mask) if entropy else None)


def response_values(
    model: Any, prompt_tokens: Sequence[Sequence[int]], response_tokens: Sequence[Sequence[int]]
) -> ResponseValues:
    """Value before each response token is chosen: what the critic expects of prompt and response so far.

        V_t = w . h_{t-1} + b        h_{t-1}: last hidden state at the token before response token t

    The first value of a row is read at the prompt's last token; none is read at the response's last token. The head of
    `model` is `score`; its dropout is not called.
    Raises `ContractError` for an empty prompt, `NumericsError` naming the rows whose value is not finite.
    """
    _refuse_empty_prompts(prompt_tokens)
    tokens, attended, mask, (rows, positions) = _batch(prompt_tokens, response_tokens, model.score.weight.device)
    before = _hidden(model, tokens, attended)[rows, positions - 1]
    values = _scatter([model.score(before).float()[:, 0]], mask)
    _check(mask & ~torch.isfinite(values), values, "a value", "the critic")
    return ResponseValues(values, mask)


def response_scores(
    model: Any, prompt_tokens: Sequence[Sequence[int]], response_tokens: Sequence[Sequence[int]]
) -> Float[Tensor, " B"]:
    """Score of each whole response: the reward model's head at its last token, plus the reward model's bias.

        r = w . h_last + bias        bias: `reward_bias` of the config (arXiv:2203.02155, section 3.5), 0 without one

    The last token is that of the row's response, whatever token pads. The head of `model` is `score`; float32.
    Raises `ContractError` for an empty response, `NumericsError` naming the rows whose score is not finite.
    """
    if empty := [row for row, response in enumerate(response_tokens) if not response]:
        raise ContractError("a response without a token has no score", where=f"rows {empty[:5]}")
    tokens, attended, _, _ = _batch(prompt_tokens, response_tokens, model.score.weight.device)
    last = attended.sum(dim=1) - 1
    hidden = _hidden(model, tokens, attended)[torch.arange(len(last), device=last.device), last]
    scores: Tensor = model.score(hidden).float()[:, 0] + reward_bias(model)
    _check(~torch.isfinite(scores)[:, None], scores[:, None], "a score", "the reward model")
    return scores


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


def _check(wrong: Bool[Tensor, "B T"], numbers: Float[Tensor, "B T"], what: str, model: str) -> None:
    if wrong.any():
        rows = wrong.any(dim=1).nonzero()[:, 0].tolist()
        worst = float(numbers.detach()[wrong][0])
        raise NumericsError(
            f"{what} is {worst}", where=f"rows {rows[:5]} of {len(wrong)}", do=f"check the tensors of {model}"
        )


def _refuse_empty_prompts(prompts: Sequence[Sequence[int]]) -> None:
    if empty := [row for row, prompt in enumerate(prompts) if not prompt]:
        raise ContractError("a response token needs a token before it", where=f"rows {empty[:5]} have empty prompts")


def _hidden(model: Any, tokens: Int[Tensor, "B L"], attended: Bool[Tensor, "B L"]) -> Float[Tensor, "B L H"]:
    """The last hidden states, of the model without its head."""
    states: Tensor = model.base_model(
        input_ids=tokens,
        attention_mask=attended.long(),
        position_ids=torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens),
        use_cache=False,
    ).last_hidden_state
    return states
