"""Forward passes over finished responses: log-probabilities, entropies, values and scores.

Logits exist for responses only, and never more than a tile of them (`chunked.py`). Rows are padded on the right; which
token pads does not matter.

Shapes: B responses, T response tokens, L prompt plus response tokens, N response tokens of all rows, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.attention import NAME
from pipeline.errors import ContractError, ExperimentError, NumericsError
from pipeline.models.checkpoint import reward_bias
from pipeline.models.chunked import token_logprobs
from pipeline.models.distributed import called
from pipeline.models.precision import arithmetic
from pipeline.products import wide_products

# Logits that are not hidden state times head; these families would silently get wrong log-probabilities.
LOGITS_CHANGED_BY = ("final_logit_softcapping", "logit_scale", "logits_scaling")

SHARE_PROMPTS = frozenset(
    {"gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"}
)  # fmt: skip
"""Families in which tokens see one another by attention alone, which takes masks and positions as they are given.

Others may not: recurrent layers (jamba, qwen3_5) read straight through, bloom reckons positions from the padding."""


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


@wide_products()
def response_logprobs(
    model: Any,
    prompt_tokens: Sequence[Sequence[int]],
    response_tokens: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> ResponseLogprobs:
    """Log-probabilities of each response token given the prompt and the response before it.

        logp_t = z_t[y_t] / tau - logsumexp(z_t / tau)        z_t: logits before token t, in float32
        H_t    = logsumexp(z_t / tau) - sum_v p_t[v] z_t[v] / tau

    Must be taken at the temperature that sampled, or old and new log-probabilities are of different policies.
    The head and the softmax run on response positions only, a tile of them at a time.

    Raises `ContractError` for an empty prompt, `NumericsError` naming the rows whose log-probability is not finite or
    above zero, `ExperimentError` for a model whose logits are more than hidden state times head.
    """
    if changed := [name for name in LOGITS_CHANGED_BY if getattr(model.config, name, None) not in (None, 1, 1.0)]:
        raise ExperimentError(f"log-probabilities of models with {', '.join(changed)} are not supported")
    _refuse_empty_prompts(prompt_tokens)
    head = model.get_output_embeddings()
    tokens, mask, (rows, positions) = _batch(prompt_tokens, response_tokens, head.weight.device)
    hidden = _hidden(model, tokens)
    before, targets = hidden[rows, positions - 1], tokens[rows, positions]
    found, entropies = token_logprobs(
        before, head.weight, head.bias, targets, temperature=temperature, entropy=entropy
    )  # fmt: skip
    logprobs = _scatter(found, mask)
    _check(mask & ~(torch.isfinite(logprobs) & (logprobs <= 0)), logprobs, "a log-probability", "the policy")
    return ResponseLogprobs(logprobs, mask, None if entropies is None else _scatter(entropies, mask))


@wide_products()
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
    tokens, mask, (rows, positions) = _batch(prompt_tokens, response_tokens, model.score.weight.device)
    before = _hidden(model, tokens)[rows, positions - 1]
    values = _scatter(model.score(before).float()[:, 0], mask)
    _check(mask & ~torch.isfinite(values), values, "a value", "the critic")
    return ResponseValues(values, mask)


@wide_products()
def response_scores(
    model: Any, prompt_tokens: Sequence[Sequence[int]], response_tokens: Sequence[Sequence[int]]
) -> Float[Tensor, " B"]:
    """Score of each whole response: the reward model's head at its last token, plus the reward model's bias.

        r = w . h_last + bias        bias: `reward_bias` of the config (arXiv:2203.02155, section 3.5), 0 without one

    The last token is that of the row's response, whatever token pads. The head of `model` is `score`; float32.
    Raises `ContractError` for an empty response, `NumericsError` naming the rows whose score is not finite.
    """
    _refuse_empty_responses(response_tokens)
    tokens, _, _ = _batch(prompt_tokens, response_tokens, model.score.weight.device)
    last = (_sizes(prompt_tokens) + _sizes(response_tokens) - 1).to(tokens.device)
    hidden = _hidden(model, tokens)[torch.arange(len(last), device=last.device), last]
    scores = _scores(model, hidden)
    _check(~torch.isfinite(scores)[:, None], scores[:, None], "a score", "the reward model")
    return scores


def group_scores(
    model: Any, prompt_tokens: Sequence[Sequence[int]], groups: Sequence[Sequence[Sequence[int]]]
) -> Float[Tensor, " B"]:
    """Score of each response of each prompt's group, group after group: as `response_scores`, with less work.

    A row is a prompt and its group. A response sees the prompt and itself, and its positions go on from the prompt's
    end, so that scores and gradients are those of responses read alone, but for rounding.

    Responses are read alone, each after its prompt, where that is less work: attention costs the square of a row, and
    responses much longer than their prompt share little. So they are in a family outside `SHARE_PROMPTS`, where a text
    is longer than the window its layers see, and with an attention that is neither `pipeline/attention.py`'s nor one of
    transformers' `eager` and `sdpa`.
    Raises as `response_scores` does, where a row is a response.
    """
    prompts = [prompt for prompt, group in zip(prompt_tokens, groups, strict=True) for _ in group]
    responses = [response for group in groups for response in group]
    _refuse_empty_responses(responses)
    if _sharing_pays(model, prompt_tokens, groups):
        scores = _scores(model, _hidden_of_groups(model, prompt_tokens, groups))
        if torch.isfinite(scores).all():
            return scores
        # One bad response spoils its whole row; read alone, it is named.
    return response_scores(model, prompts, responses)


def _batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B T"], tuple[Tensor, Tensor]]:
    """Right-padded tokens, the responses' mask, and (row, position) of every response token."""
    starts, counts = _sizes(prompts), _sizes(responses)
    attended, mask = _mask(starts + counts), _mask(counts)
    tokens = _spread(_flat(chain.from_iterable(zip(prompts, responses, strict=True))), attended)
    rows, offsets = mask.nonzero(as_tuple=True)
    places = (rows.to(device), (starts[rows] + offsets).to(device))
    return tokens.to(device), mask.to(device), places


def _hidden_of_groups(
    model: Any, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Sequence[int]]]
) -> Float[Tensor, "B H"]:
    """The last hidden state at the last token of each response; rows are a prompt and its group."""
    parts = [part for prompt, group in zip(prompts, groups, strict=True) for part in (prompt, *group)]
    counts = _sizes(groups) + 1
    starts, sizes, rows = _sizes(prompts), _sizes(parts), torch.arange(len(groups)).repeat_interleave(counts)
    lengths = torch.zeros_like(starts).index_add(0, rows, sizes)
    attended = _mask(lengths)
    ends = sizes.cumsum(0) - (lengths.cumsum(0) - lengths)[rows]
    is_response = torch.ones(len(parts), dtype=torch.bool).index_fill(0, counts.cumsum(0) - counts, False)
    # By how much a part's positions are less than its columns.
    shifts = torch.where(is_response, ends - sizes - starts[rows], 0)

    device = model.score.weight.device
    columns = torch.arange(attended.shape[1])
    positions = (columns - _spread(shifts.repeat_interleave(sizes), attended)) * attended
    part = _spread(torch.arange(1, len(parts) + 1).repeat_interleave(sizes), attended).to(device)
    of_prompt = (columns < starts[:, None]).to(device)
    seen = ((part[:, :, None] == part[:, None, :]) | of_prompt[:, None, :]).tril()
    # Numbers to add: eager attention takes no other mask. Padding sees itself, so that no softmax is over nothing.
    mask = torch.zeros(seen.shape, dtype=model.score.weight.dtype, device=device).masked_fill_(~seen, -torch.inf)
    hidden = _hidden(model, _spread(_flat(parts), attended).to(device), mask[:, None], positions.to(device))
    return hidden[rows[is_response].to(device), (ends - 1)[is_response].to(device)]


def _sharing_pays(model: Any, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether rows of a prompt and its group are right with this model, and less work than a row per response.

    In a layer, a token costs a multiplication per weight, and 2 x width of them per token of its row, which take twice
    as long: measured on a CPU, forward and backward, with 2 and 5 million parameters.
    """
    config, rows = model.config, torch.arange(len(groups)).repeat_interleave(_sizes(groups))
    starts, responses = _sizes(prompts), _sizes([response for group in groups for response in group])
    alone = int((starts[rows] + responses).max())
    together = int(starts.index_add(0, rows, responses).max())
    # transformers has no public name for the attention.
    if config.model_type not in SHARE_PROMPTS or config._attn_implementation not in ("eager", "sdpa", NAME):
        return False
    if alone > (getattr(config, "sliding_window", None) or alone):
        return False
    weights = model.num_parameters(exclude_embeddings=True) / config.num_hidden_layers
    context = weights / (4 * config.hidden_size)
    return bool(len(groups) * together * (context + together) < len(rows) * alone * (context + alone))


def _scores(model: Any, hidden: Float[Tensor, "B H"]) -> Float[Tensor, " B"]:
    scores: Tensor = model.score(hidden).float()[:, 0] + reward_bias(model)
    return scores


def _sizes(rows: Sequence[Sequence[Any]]) -> Int[Tensor, " B"]:
    return torch.tensor([len(row) for row in rows])


def _flat(rows: Iterable[Sequence[int]]) -> Int[Tensor, " N"]:
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long)


def _mask(lengths: Int[Tensor, " B"]) -> Bool[Tensor, "B L"]:
    """True where a row of that length has a token."""
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _spread(flat: Int[Tensor, " N"], mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Rows of numbers, padded with 0."""
    return torch.zeros(mask.shape, dtype=flat.dtype).masked_scatter(mask, flat)


def _scatter(numbers: Float[Tensor, " N"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, numbers)


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


def _refuse_empty_responses(responses: Sequence[Sequence[int]]) -> None:
    if empty := [row for row, response in enumerate(responses) if not response]:
        raise ContractError("a response without a token has no score", where=f"rows {empty[:5]}")


def _hidden(
    model: Any, tokens: Int[Tensor, "B L"], mask: Tensor | None = None, positions: Int[Tensor, "B L"] | None = None
) -> Float[Tensor, "B L H"]:
    """The last hidden states, of the model without its head; `mask` as transformers takes it.

    Padding on the right needs none: no token sees what comes after it. Without one, attention passes over the later
    half and heads that share keys share one copy of them.
    """
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens)
    with arithmetic(model):
        states = called(model, _states, input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return states.float()


def _states(model: Any, **given: Any) -> Float[Tensor, "B L H"]:
    states: Tensor = model.base_model(**given).last_hidden_state
    return states
