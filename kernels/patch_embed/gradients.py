"""Gradients in Triton: sums over tokens, of weights and of tables, and what a norm that was folded into a weight gives its tokens.

Tokens are rows of a matrix here, also those of clips, whose patches are few numbers beside the channels of a transformer: they are copied
once, and read by all programs. `token_products` is narrow^T @ wide over the tokens, for each row of the tables if there are several, in
chunks of tokens whose partial sums `sum_parts` adds in their order. A chunk is counted from a row's own first token: other rows change no
bit of a row's sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.block import PRECISION
from ..launch import cdiv, launch
from ..norms.fused import chunks_of_rows
from .clips import TYPES, as_bytes, compute_capability, power, strides_of, unit_of, weights
from .project import FOLDED, Folded, factor_of, table_rows

CHUNK = 512
"""Tokens whose products are one partial sum."""
MOST_ELEMENTS = 256
"""Of a patch, whose gradient a program of `folded_gradient` holds."""
SPLITS = 16
"""The parts that the tokens of a row of a table are summed in for its gradient."""


@triton.jit(do_not_specialize=["chunk", "tokens"])
def token_products(
    partial_ptr, narrow_sums_ptr, wide_sums_ptr, narrow_ptr, wide_ptr, statistics_ptr, used_ptr, order_ptr, starts_ptr, chunk_starts_ptr,
    owners_ptr, stride_narrow, stride_wide, chunk, tokens,
    NARROW: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a chunk of tokens: narrow^T @ wide, (BLOCK_K, BLOCK_N), in float32, and where there are places for them, the sums of narrow and of
    wide. statistics: (tokens, 2), of wide the mean and the inverse of the deviation: then it is normalised.
    """
    BLOCKS_N: tl.constexpr = (WIDE + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (NARROW + BLOCK_K - 1) // BLOCK_K
    precision: tl.constexpr = PRECISION if dtype == tl.float32 else None
    nth_k, nth_n = tl.program_id(0) % BLOCKS_K, tl.program_id(0) // BLOCKS_K % BLOCKS_N
    part = (tl.program_id(0) // (BLOCKS_K * BLOCKS_N)).to(tl.int64)
    if owners_ptr is None:
        first = part * chunk
        stop = tl.minimum(first + chunk, tokens)
    else:
        owner = tl.load(owners_ptr + part)
        first = tl.load(starts_ptr + owner) + (part - tl.load(chunk_starts_ptr + owner)) * chunk
        stop = tl.minimum(first + chunk, tl.load(starts_ptr + owner + 1))
    n, k = nth_n * BLOCK_N + tl.arange(0, BLOCK_N), nth_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    # Sums over eight tokens each, for threads to add up their own alone.
    narrow_sums = tl.zeros([8, BLOCK_K], tl.float32)
    wide_sums = tl.zeros([8, BLOCK_N], tl.float32)
    for start in tl.range(first, stop, BLOCK_M, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_M)
        there = token < stop
        if order_ptr is not None:
            token = tl.load(order_ptr + token, mask=there, other=0)
        if used_ptr is not None:
            there &= tl.load(used_ptr + token, mask=there, other=0) != 0
        mask_a, mask_b = there[:, None] & (k < NARROW)[None, :], there[:, None] & (n < WIDE)[None, :]
        a = tl.load(narrow_ptr + token.to(tl.int64)[:, None] * (stride_narrow * UNIT) + k[None, :], mask=mask_a, other=0.0)
        b = tl.load(wide_ptr + token.to(tl.int64)[:, None] * (stride_wide * UNIT) + n[None, :], mask=mask_b, other=0.0)
        if narrow_sums_ptr is not None:
            narrow_sums += tl.sum(tl.reshape(a.to(tl.float32), [BLOCK_M // 8, 8, BLOCK_K]), 0)
        if wide_sums_ptr is not None:
            wide_sums += tl.sum(tl.reshape(b.to(tl.float32), [BLOCK_M // 8, 8, BLOCK_N]), 0)
        a = a.to(dtype)
        if statistics_ptr is not None:
            mean = tl.load(statistics_ptr + 2 * token, mask=there, other=0.0)
            rstd = tl.load(statistics_ptr + 2 * token + 1, mask=there, other=0.0)
            b = tl.where(mask_b, (b.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        acc = tl.dot(tl.trans(a), b.to(dtype), acc, input_precision=precision)
    mask = (k < NARROW)[:, None] & (n < WIDE)[None, :]
    tl.store(partial_ptr + part * (NARROW * WIDE) + k[:, None] * WIDE + n[None, :], acc, mask=mask)
    if narrow_sums_ptr is not None:
        tl.store(narrow_sums_ptr + part * NARROW + k, tl.sum(narrow_sums, 0), mask=(k < NARROW) & (nth_n == 0))
    if wide_sums_ptr is not None:
        tl.store(wide_sums_ptr + part * WIDE + n, tl.sum(wide_sums, 0), mask=(n < WIDE) & (nth_k == 0))


@triton.jit(do_not_specialize=["chunks"])
def sum_parts(out_ptr, partial_ptr, chunk_starts_ptr, chunks, SIZE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """BLOCK numbers of a row: the sums of the parts of its chunks, of all without chunk_starts."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    first, stop = row * 0, row * 0 + chunks
    if chunk_starts_ptr is not None:
        first, stop = tl.load(chunk_starts_ptr + row), tl.load(chunk_starts_ptr + row + 1)
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for start in range(first, stop, STEP):
        part = start + tl.arange(0, STEP)[:, None]
        total += tl.load(partial_ptr + part * SIZE + i[None, :], mask=(part < stop) & (i < SIZE)[None, :], other=0.0)
    tl.store(out_ptr + row * SIZE + i, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=i < SIZE)


class Products(NamedTuple):
    """products: float32 (table rows, narrow, wide); narrow_sums and wide_sums, (table rows, narrow) and (table rows, wide), or None."""

    products: Tensor
    narrow_sums: Tensor | None
    wide_sums: Tensor | None


def products_over_tokens(
    op: str,
    narrow: Tensor,
    wide: Tensor,
    dtype: torch.dtype,
    *,
    rows: Tensor | None = None,
    table_rows: int = 1,
    statistics: Tensor | None = None,
    used: Tensor | None = None,
    narrow_sums: bool = False,
    wide_sums: bool = False,
) -> Products:
    """narrow^T @ wide in dtype, summed in float32 over the tokens of each row; (tokens, narrow) and (tokens, wide).

    rows: of each token, without them all are of one. statistics: mean and inverse deviation of each token of wide, float32 (tokens, 2), by
    which it is normalised. used: bool (tokens,), which have a part in it, None for all.
    """
    (tokens, width), elements = wide.shape, narrow.shape[1]
    half = dtype.itemsize == 2
    block_n, block_k = power(width, 16, 128 if half else 32), power(elements, 16, 64)
    table = (None,) * 4 if rows is None or table_rows == 1 else chunks_of_rows(rows, table_rows, CHUNK)
    chunks = cdiv(tokens, CHUNK) if table[3] is None else len(table[3])
    partial = wide.new_empty(chunks, elements, width, dtype=torch.float32)
    sums = [
        wide.new_empty(chunks, size, dtype=torch.float32) if want else None for want, size in ((narrow_sums, elements), (wide_sums, width))
    ]
    unit = unit_of(narrow, wide)
    launch(
        op, token_products, chunks * cdiv(width, block_n) * cdiv(elements, block_k), partial, *sums, narrow, wide, statistics,
        as_bytes(used), *table, *strides_of(unit, narrow, wide), CHUNK, tokens,
        NARROW=elements, WIDE=width, dtype=TYPES[dtype], UNIT=unit, BLOCK_M=64 if half else 32, BLOCK_N=block_n, BLOCK_K=block_k,
        STAGES=3 if half else 2, num_warps=8 if compute_capability() >= 100 else 4,
    )  # fmt: skip
    return Products(*(None if each is None else _sum_parts(op, each, table[2], table_rows) for each in (partial, *sums)))


def _sum_parts(op: str, partial: Tensor, chunk_starts: Tensor | None, table_rows: int) -> Tensor:
    """(chunks, ...) to (table rows, ...)."""
    size = partial[0].numel() if len(partial) else partial.shape[1:].numel()
    out = partial.new_empty(table_rows, *partial.shape[1:])
    launch(
        op, sum_parts, table_rows * cdiv(size, 128), out, partial, chunk_starts, len(partial),
        SIZE=size, BLOCK=128, STEP=16, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def folded_gradient(
    dx_ptr, x_ptr, d_ptr, out_ptr, statistics_ptr, sums_ptr, weight_ptr, scale_ptr, norm_weight_ptr, rows_ptr,
    stride_x, stride_d, stride_out, stride_weight, stride_row, stride_scale, tokens,
    WIDTH: tl.constexpr, ELEMENTS: tl.constexpr, NORM: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of tokens that a folded norm and its product read, from that of the product and what it gave: with xhat the normalised
    token and g = folded^T @ d,

        dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),   mean(g) = d . sum(folded) / WIDTH,   mean(g * xhat) = d . (out - added) / WIDTH

    so that neither mean needs another pass over the channels.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = token < tokens
    at = tl.zeros([BLOCK_M], tl.int32)
    if rows_ptr is not None:
        at = tl.load(rows_ptr + token, mask=there, other=0).to(tl.int32)
    mean = tl.load(statistics_ptr + 2 * token, mask=there, other=0.0)
    rstd = tl.load(statistics_ptr + 2 * token + 1, mask=there, other=0.0)
    waiting = there.to(tl.int32)
    while tl.max(waiting, 0) > 0:  # for each row of the tables that a token has, mostly one
        now = tl.min(tl.where(waiting > 0, at, 0x7FFFFFFF), 0)
        row, mine = now.to(tl.int64), there & (at == now)
        mean_g, along = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        parts = ()
        for i in tl.static_range(PARTS):
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = mine[:, None] & (k < ELEMENTS)[None, :]
            d = tl.load(d_ptr + token[:, None] * (stride_d * UNIT) + k[None, :], mask=mask, other=0.0)
            out = tl.load(out_ptr + token[:, None] * (stride_out * UNIT) + k[None, :], mask=mask, other=0.0).to(tl.float32)
            sums = sums_ptr + 2 * (row * ELEMENTS + k)
            added = tl.load(sums + 1, mask=k < ELEMENTS, other=0.0)
            along += tl.sum(d.to(tl.float32) * (out - added[None, :]), 1) / WIDTH
            if NORM == "layer":
                mean_g += tl.sum(d.to(tl.float32) * tl.load(sums, mask=k < ELEMENTS, other=0.0)[None, :], 1) / WIDTH
            parts += (d,)
        for step in tl.range(0, WIDTH, BLOCK_D, num_stages=STAGES):
            c = step + tl.arange(0, BLOCK_D)
            there_c = c < WIDTH
            mask = mine[:, None] & there_c[None, :]
            x = tl.load(x_ptr + token[:, None] * (stride_x * UNIT) + c[None, :], mask=mask, other=0.0).to(tl.float32)
            g = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for i in tl.static_range(PARTS):
                k = i * BLOCK_K + tl.arange(0, BLOCK_K)
                w = weights(weight_ptr + row * (stride_row * UNIT), stride_weight * UNIT, k, c, k < ELEMENTS, there_c, False)
                if scale_ptr is not None or norm_weight_ptr is not None:
                    scale = scale_ptr + row * (stride_scale * UNIT) if scale_ptr is not None else None
                    w = (w.to(tl.float32) * factor_of(scale, norm_weight_ptr, c, there_c)[None, :]).to(w.dtype)
                g = tl.dot(parts[i], w, g)
            xhat = (x - mean[:, None]) * rstd[:, None]
            dx = (g - mean_g[:, None] - xhat * along[:, None]) * rstd[:, None]
            tl.store(dx_ptr + token[:, None] * WIDTH + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        waiting = tl.where(at == now, 0, waiting)


def few_rows(elements: int, tokens: int, shift: Tensor | None, scale: Tensor | None) -> bool:
    """Whether `gradients_of_parameters` is for so many tokens: it makes a matrix as the weight for each row of the tables."""
    return table_rows(shift, scale) * elements * FOLDED <= tokens


def gradient_of_tokens(
    op: str, d: Tensor, out: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, rows: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, kind: str,
) -> Tensor:  # fmt: skip
    """dx of a projection whose norm was done to the weight (`project_tokens`), of at most MOST_ELEMENTS, from its result and the gradient
    of that, both in tokens.
    """
    elements, dx = d.shape[1], x.new_empty(x.shape)
    weight, stride_row, scale, norm_weight, sums = Folded.of(op, len(x), weight, bias, shift, scale, norm_weight, norm_bias)
    block_k, unit = power(elements, 16, 64), unit_of(x, d, out, weight, scale)
    launch(
        op, folded_gradient, cdiv(len(x), 64), dx, x, d, out, statistics, sums, weight, scale, norm_weight,
        None if rows is None else rows.contiguous(), *strides_of(unit, x, d, out, weight), stride_row // unit, *strides_of(unit, scale),
        len(x), WIDTH=x.shape[1], ELEMENTS=elements, NORM=kind, UNIT=unit, BLOCK_M=64, BLOCK_D=power(x.shape[1], 16, 64), BLOCK_K=block_k,
        PARTS=cdiv(elements, block_k), STAGES=3 if elements <= 128 else 2, num_warps=4,
    )  # fmt: skip
    return dx


def gradients_of_parameters(
    op: str, d: Tensor, out: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, rows: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, kind: str,
) -> list[Tensor | None]:  # fmt: skip
    """Likewise those of weight, bias, shift, scale, the norm's weight and its bias, of all that there are.

    They follow from products[r] = sum of d^T @ xhat and sums[r] = sum of d over the tokens of row r, xhat being the normalised token.
    """
    number = table_rows(shift, scale)
    rows = None if rows is None or number == 1 else rows.contiguous()
    how = {"rows": rows, "table_rows": number, "statistics": statistics, "narrow_sums": True}
    products, sums, _ = products_over_tokens(op, d, x, weight.dtype, **how)
    wide, factor = weight.float(), products.new_ones(number, 1) if scale is None else 1 + scale.float()
    of_products, of_sums = (wide * products).sum(1), sums @ wide  # (table rows, dim) each
    whole = factor if norm_weight is None else factor * norm_weight.float()
    dweight = (products * whole[:, None]).sum(0)
    for added in (shift, None if norm_bias is None else norm_bias.float() * factor):
        if added is not None:
            dweight += sums.T @ added.float().expand(number, x.shape[1])
    dscale = of_products if norm_weight is None else of_products * norm_weight.float()
    dscale = dscale if norm_bias is None else dscale + of_sums * norm_bias.float()
    found = dweight, sums.sum(0), of_sums, dscale, (of_products * factor).sum(0), (of_sums * factor).sum(0)
    given = weight, bias, shift, scale, norm_weight, norm_bias
    return [None if like is None else each.to(like.dtype) for each, like in zip(found, given, strict=True)]


@triton.jit(do_not_specialize=["table_rows"])
def sum_rows(
    partial_ptr, d_ptr, order_ptr, starts_ptr, stride_d, table_rows,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of d over every SPLITS-th STEP of the tokens of a row, in their order, float32 (SPLITS, table_rows, WIDTH)."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    n = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    nth = tl.program_id(0) // BLOCKS
    row, split = nth % table_rows, nth // table_rows
    stop = tl.load(starts_ptr + row + 1)
    total = tl.zeros([STEP, BLOCK_N], tl.float32)
    for i in range(tl.load(starts_ptr + row) + split * STEP, stop, SPLITS * STEP):
        each = i + tl.arange(0, STEP)
        token = tl.load(order_ptr + each, mask=each < stop, other=0)
        mask = (each < stop)[:, None] & (n < WIDTH)[None, :]
        total += tl.load(d_ptr + token[:, None] * (stride_d * UNIT) + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + nth.to(tl.int64) * WIDTH + n, tl.sum(total, 0), mask=n < WIDTH)


def gradient_of_table(op: str, d: Tensor, index: Tensor, table_rows: int) -> Tensor:
    """The sum of d over the tokens of each row, float32 (table_rows, dim); tokens of an index of table_rows have none."""
    index, order = torch.sort(index, stable=True)
    starts = torch.searchsorted(index, torch.arange(table_rows + 1, dtype=index.dtype, device=index.device))
    partial, unit = d.new_empty(SPLITS, table_rows, d.shape[1], dtype=torch.float32), unit_of(d)
    block = power(d.shape[1], 16, 256)
    launch(
        op, sum_rows, SPLITS * table_rows * cdiv(d.shape[1], block), partial, d, order, starts, *strides_of(unit, d), table_rows,
        WIDTH=d.shape[1], UNIT=unit, SPLITS=SPLITS, STEP=8, BLOCK_N=block, num_warps=4,
    )  # fmt: skip
    return partial.sum(0)
