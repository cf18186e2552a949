"""Products of float32 matrices by kernels that use the whole width of the processor."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@contextmanager
def wide_products() -> Iterator[None]:
    """Have oneDNN form products here, where that is faster and as exact; nothing changes elsewhere.

    torch leaves them to MKL, which takes half the width of AVX-512 on a processor that is not Intel's. Its only switch
    to oneDNN is the one that allows factors to be rounded to bfloat16 as well. Kernels that round are for matrix units
    (AMX) alone; on a processor without them all 24 bits are kept, which is tried before it is relied on.
    """
    if not exact_and_wide():
        yield
        return
    with _switched("bf16"):
        yield


@contextmanager
def narrow_products() -> Iterator[None]:
    """Within `wide_products`: leave these to MKL. oneDNN compiles a kernel per shape, and few products repay it."""
    with _switched("none"):
        yield


@cache
def exact_and_wide() -> bool:
    """Whether oneDNN's products are those of float32 on this processor, and wider than MKL's."""
    able = torch.cpu.get_capabilities()
    if torch.cuda.is_available() or able.get("amx_tile") or not able.get("avx512_f"):
        return False
    with _switched("bf16"):
        return all(_keeps_all_bits(size) for size in (16, 128, 512))


@contextmanager
def _switched(rounding: str) -> Iterator[None]:
    of_products: Any = torch.backends.mkldnn
    before, of_products.matmul.fp32_precision = of_products.matmul.fp32_precision, rounding
    try:
        yield
    finally:
        of_products.matmul.fp32_precision = before


def _keeps_all_bits(size: int) -> bool:
    numbers = torch.full((size, size), 1 + 2**-23)
    return bool((numbers @ torch.eye(size) == numbers).all())
