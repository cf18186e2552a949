"""Forward passes over finished responses: log-probabilities, entropies, values and scores.

Logits exist for responses only, and never more than a tile of them (`chunked.py`). Where a model allows it next to no
padding is computed, and what texts begin with in common is read once (`pipeline/packing.py`).

Shapes: B responses, T response tokens, L prompt plus response tokens, N response tokens of all rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.attention import NAME
from pipeline.errors import ContractError, ExperimentError, NumericsError
from pipeline.models.checkpoint import reward_bias
from pipeline.models.chunked import token_logprobs
from pipeline.models.distributed import called
from pipeline.models.precision import arithmetic
from pipeline.packing import Layout, Packed, Padded
from pipeline.products import wide_products

# Logits that are not hidden state times head; these families would silently get wrong log-probabilities.
LOGITS_CHANGED_BY = ("final_logit_softcapping", "logit_scale", "logits_scaling")

PACKED = frozenset(
    {"gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"}
)  # fmt: skip
"""Families in which tokens see one another by attention alone, which is asked for as it is told, and takes positions as
they are given.

Others may not: recurrent layers (jamba, qwen3_5) read straight through, bloom reckons positions from the padding."""


def packs(model: Any, longest: int = 0) -> bool:
    """Whether the model reads texts of at most so many tokens behind one another."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in PACKED:
        return False
    # transformers has no public name for the attention.
    return bool(config._attn_implementation == NAME and longest <= (getattr(config, "sliding_window", None) or longest))


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
    states, layout = _read(model, prompt_tokens, response_tokens)
    found, entropies = token_logprobs(
        layout.before(states), head.weight, head.bias, layout.targets, temperature=temperature, entropy=entropy
    )  # fmt: skip
    mask, logprobs = layout.mask, layout.in_rows(found)
    _check(mask & ~(torch.isfinite(logprobs) & (logprobs <= 0)), logprobs, "a log-probability", "the policy")
    return ResponseLogprobs(logprobs, mask, None if entropies is None else layout.in_rows(entropies))


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
    states, layout = _read(model, prompt_tokens, response_tokens)
    mask, values = layout.mask, layout.in_rows(model.score(layout.before(states)).float()[:, 0])
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
    states, layout = _read(model, prompt_tokens, response_tokens)
    scores: Tensor = model.score(layout.last(states)).float()[:, 0] + reward_bias(model)
    _check(~torch.isfinite(scores)[:, None], scores[:, None], "a score", "the reward model")
    return scores


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


def _read(model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> tuple[Tensor, Layout]:
    """The last hidden states, [tokens, H], of the model without its head; and how the tokens are laid out.

    No mask is needed: no token sees what comes after it, and padding comes last.
    """
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    packed = packs(model, longest)
    place = next(model.parameters()).device
    layout = (Packed if packed else Padded)(prompts, responses, place)
    given: dict[str, Any] = {"attention_mask": None}
    if isinstance(layout, Packed):
        # With four dimensions a mask is taken as it is. Made by transformers, it would be of all tokens by all tokens.
        given = {"attention_mask": torch.zeros(1, 1, 1, 1, device=place), "packed": layout}
    with arithmetic(model):
        states = called(
            model, _states, input_ids=layout.tokens, position_ids=layout.positions, use_cache=False, **given
        )
    if isinstance(layout, Packed) and layout.attended != model.config.num_hidden_layers:
        raise ExperimentError(f"{model.config.model_type} attends by other means than it is asked to")
    return states.flatten(0, 1).float(), layout


def _states(model: Any, **given: Any) -> Float[Tensor, "B L H"]:
    states: Tensor = model.base_model(**given).last_hidden_state
    return states
