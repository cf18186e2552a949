"""Log-probabilities and entropies of tokens from hidden states, without all logits at once and with their own backward.

Shapes: N positions, H width of the hidden states, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = {"cpu": 2**25, "cuda": 2**29}
"""Of a tile of logits in float32, by kind of device; two or three of this size exist at once."""


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    tile: int | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """Log-probability of each target, and the entropy of what it is drawn from (None unless asked for), in float32.

        z_t    = (W h_t + b) / tau
        logp_t = z_t[y_t] - logsumexp(z_t)         H_t = logsumexp(z_t) - sum_v p_t[v] z_t[v]

    `tile` positions at a time (as many as `TILE_BYTES` hold when absent). The backward pass keeps the normalizer of
    each position and makes its logits again:

        dL/dz_t[v] = g_t ([v = y_t] - p_t[v]) - e_t p_t[v] (log p_t[v] + H_t)        g = dL/dlogp,  e = dL/dH

    so that no [N, V] exists in either pass, and the gradient of `weight` is summed in place.
    """
    rows = tile or max(1, TILE_BYTES.get(hidden.device.type, TILE_BYTES["cuda"]) // (4 * len(weight)))
    read: Any = _TokenLogprobs.apply  # torch has no annotation here
    logprobs, entropies = read(hidden, weight, bias, targets, temperature, entropy, rows)
    return logprobs, entropies if entropy else None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        entropy: bool, rows: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logprobs, normalizers = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
        entropies = torch.zeros_like(logprobs)
        spare = _buffer(hidden, weight, rows, torch.float32) if entropy else None
        for part, z in _tiles(hidden, weight, bias, temperature, rows):
            chosen = z.gather(1, targets[part, None])[:, 0]
            largest = z.amax(dim=1)
            z.sub_(largest[:, None])
            if spare is None:
                total = z.exp_().sum(dim=1)
            else:
                p = torch.exp(z, out=spare[: len(z)])
                total = p.sum(dim=1)
                entropies[part] = total.log() - z.mul_(p).sum(dim=1) / total
            normalizers[part] = largest + total.log()
            logprobs[part] = chosen - normalizers[part]
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers, entropies)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers, entropies = ctx.saved_tensors
        g = torch.zeros_like(normalizers) if of_logprobs is None else of_logprobs
        wanted = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        of_hidden, of_weight, of_bias = (torch.zeros_like(of) if needed else None for of, needed in wanted)
        spare = None if of_entropies is None else _buffer(hidden, weight, ctx.rows, torch.float32)
        for part, z in _tiles(hidden, weight, bias, ctx.temperature, ctx.rows):
            z.sub_(normalizers[part, None])
            if spare is None or of_entropies is None:
                z.exp_().mul_(-g[part, None])
            else:
                p = torch.exp(z, out=spare[: len(z)])
                z.add_(entropies[part, None]).mul_(of_entropies[part, None]).add_(g[part, None]).mul_(p).neg_()
            z.scatter_add_(1, targets[part, None], g[part, None])
            of_z = z.div_(ctx.temperature).to(weight.dtype)
            if of_hidden is not None:
                torch.mm(of_z, weight, out=of_hidden[part])
            if of_weight is not None:
                of_weight.addmm_(of_z.t(), hidden[part])
            if of_bias is not None:
                of_bias += of_z.sum(dim=0)
        return of_hidden, of_weight, of_bias, None, None, None, None


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """Positions and their logits in float32, one tile after the other in the same memory: to be overwritten."""
    product = _buffer(hidden, weight, rows, weight.dtype)
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        z = torch.mm(hidden[part], weight.t(), out=product[: part.stop - start])
        if bias is not None:
            z += bias
        z = z.float()
        if temperature != 1:
            z /= temperature
        yield part, z


def _buffer(hidden: Tensor, weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Room for a tile: memory asked for anew at every tile costs a CPU more than what is written there."""
    return hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=dtype)
