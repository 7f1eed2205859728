"""Modulated norms and gated residuals in Triton: the kernels, how they are launched, and the operators of torch.library that call them.

A program holds whole tokens in registers: the channels in PARTS parts of PART, a power of two that gives each thread 16 bytes of bfloat16,
so that 3072 channels are 3 parts of 1024 and 1152 are 5 of 256, with little or nothing to fill up. Statistics are of two passes over these
registers. Forwards a program is one tile of tokens. Backwards it walks through a chunk of tokens that share a row of the tables, and sums

    a = sum_i dn_i,   b = sum_i dn_i * xhat_i,   g = sum_i dx'_i * y_i      (n the result of the norm, xhat that before weight and bias)

over them, in float32 and in their order; a second kernel adds up the chunks of each row. All gradients of parameters follow from these
three, since weight, scale and gate are the same throughout a row. The chunks of a row are counted from its own first token, and their size
depends on the number of channels alone: other rows change no bit of a row's sums.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..dispatch import NO_GLUON, as_operator, select
from ..fp8 import FP8, LARGEST
from ..launch import cdiv, lanes, launch

LARGEST_CHANNELS = 16384
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FIRST_WITH_FP8 = (8, 9)
"""Ada."""
E4M3_LARGEST = tl.constexpr(LARGEST)
PARTS = 5
"""The most that a token is split into where a kernel holds one or two numbers for each channel; and, where it holds up to five:"""
PARTS_OF_SUMS = 3
MOST_CHUNKS = 1024
"""Of tokens without rows, whose sums depend on all of them."""


# A tuple of constants goes through all of the functions below: DIMS, the channels, those of a part, and the number of parts.


@triton.jit
def _part(ptr, there, NTH: tl.constexpr, DIMS):
    """Part NTH of the channels of rows, (rows, PART); zeros past the channels and where not `there`, None for everywhere."""
    c = (tl.arange(0, DIMS[1]) + NTH * DIMS[1])[None, :]
    if DIMS[0] >= (NTH + 1) * DIMS[1]:
        x = tl.load(ptr + c) if there is None else tl.load(ptr + c, mask=there, other=0.0)
    else:
        x = tl.load(ptr + c, mask=c < DIMS[0] if there is None else there & (c < DIMS[0]), other=0.0)
    return x


@triton.jit
def _load(ptr, there, NTH: tl.constexpr, DIMS):
    """The same in float32."""
    return _part(ptr, there, NTH, DIMS).to(tl.float32)


@triton.jit
def _fetch(ptr, there, DIMS):
    """All parts as they are, in half the registers, for later."""
    x = ()
    for i in tl.static_range(DIMS[2]):
        x += (_part(ptr, there, i, DIMS),)
    return x


@triton.jit
def _store(ptr, x, there, NTH: tl.constexpr, DIMS):
    c = (tl.arange(0, DIMS[1]) + NTH * DIMS[1])[None, :]
    x = x.to(ptr.dtype.element_ty)
    if DIMS[0] >= (NTH + 1) * DIMS[1]:
        tl.store(ptr + c, x, mask=there)
    else:
        tl.store(ptr + c, x, mask=c < DIMS[0] if there is None else there & (c < DIMS[0]))


@triton.jit
def _store_all(ptr, x, there, DIMS):
    for i in tl.static_range(DIMS[2]):
        _store(ptr, x[i], there, i, DIMS)


@triton.jit
def _mean(x, DIMS):
    """Of each row, (rows, 1)."""
    total = x[0]
    for i in tl.static_range(1, DIMS[2]):
        total += x[i]
    return tl.sum(total, 1, keep_dims=True) / DIMS[0]


@triton.jit
def _products(x, y, DIMS):
    z = ()
    for i in tl.static_range(DIMS[2]):
        z += (x[i] * y[i],)
    return z


@triton.jit
def _normalise(x, eps, LAYER: tl.constexpr, DIMS):
    """The rows over the root of their mean square, less their mean before if LAYER; and the inverse of that root, (rows, 1)."""
    if LAYER:
        mean = _mean(x, DIMS)
        centred = ()
        for i in tl.static_range(DIMS[2]):
            c = (tl.arange(0, DIMS[1]) + i * DIMS[1])[None, :]
            centred += (x[i] - mean if DIMS[0] >= (i + 1) * DIMS[1] else tl.where(c < DIMS[0], x[i] - mean, 0.0),)
        x = centred
    rstd = tl.rsqrt(_mean(_products(x, x, DIMS), DIMS) + eps)
    normed = ()
    for i in tl.static_range(DIMS[2]):
        normed += (x[i] * rstd,)
    return normed, rstd


@triton.jit
def _tanh(x):
    """Within a few units in the last place: near zero by a polynomial (Cephes), where the exponential's form cancels."""
    z = x * x
    p = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1) * z
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x * p + x, tl.where(x < 0.0, -far, far))


@triton.jit
def _rounded(x, A: tl.constexpr, B: tl.constexpr, EXACT: tl.constexpr):
    """If EXACT, what torch makes of an operation on dtypes A and B, of which any two that differ give float32."""
    if EXACT and A == B:
        x = x.to(A).to(tl.float32)
    return x


@triton.jit
def _look_up(ptr, token, there):
    """Of tokens, what an index says."""
    x = tl.load(ptr + token) if there is None else tl.load(ptr + token, mask=there, other=0)
    return x.to(tl.int64)


@triton.jit(do_not_specialize=["tokens"])
def norm_forward(
    x_ptr, y_ptr, gate_ptr, rows_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, out_ptr, normed_ptr, quantum_ptr,
    stride_x, stride_y, stride_gate, stride_shift, stride_scale, eps, tokens,
    UNIT: tl.constexpr, TOKENS: tl.constexpr, LAYER: tl.constexpr, TANH: tl.constexpr, EXACT: tl.constexpr, DIMS,
):  # fmt: skip
    """TOKENS tokens: x + gate * y, if there is y, and its modulated norm, if there is a place for it, as E4M3 if there is one
    for its scales.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    there = None if TOKENS == 1 else token < tokens
    X: tl.constexpr = x_ptr.dtype.element_ty
    Y: tl.constexpr = X if y_ptr is None else y_ptr.dtype.element_ty
    G: tl.constexpr = Y if gate_ptr is None else gate_ptr.dtype.element_ty
    S: tl.constexpr = X if scale_ptr is None else scale_ptr.dtype.element_ty
    row = token if rows_ptr is None else _look_up(rows_ptr, token, there)
    # Each step reads all that it needs before it writes: the compiler moves no read up past a write.
    x = ()
    for i in tl.static_range(DIMS[2]):
        part = _load(x_ptr + token * (stride_x * UNIT), there, i, DIMS)
        if y_ptr is not None:
            y = _load(y_ptr + token * (stride_y * UNIT), there, i, DIMS)
            if gate_ptr is not None:
                gate = _load(gate_ptr + row * (stride_gate * UNIT), there, i, DIMS)
                y = _rounded(y * (_rounded(_tanh(gate), G, G, EXACT) if TANH else gate), Y, G, EXACT)
            part = _rounded(part + y, X, Y if Y == G else tl.float32, EXACT)
            part = part.to(X).to(tl.float32) if EXACT else part
        x += (part,)
    if y_ptr is not None:
        _store_all(out_ptr + token * DIMS[0], x, there, DIMS)
    if normed_ptr is not None:
        x, _rstd = _normalise(x, eps, LAYER, DIMS)
        if scale_ptr is not None:
            raw_scale = _fetch(scale_ptr + row * (stride_scale * UNIT), there, DIMS)
        if shift_ptr is not None:
            raw_shift = _fetch(shift_ptr + row * (stride_shift * UNIT), there, DIMS)
        normed = ()
        for i in tl.static_range(DIMS[2]):
            n = x[i]
            if weight_ptr is not None:
                n *= _load(weight_ptr, None, i, DIMS)
            if bias_ptr is not None:
                n += _load(bias_ptr, None, i, DIMS)
            n = _rounded(n, X, X, EXACT)
            if scale_ptr is not None:
                factor = _rounded(1.0 + raw_scale[i].to(tl.float32), S, S, EXACT)
                n = _rounded(n * factor, X, S, EXACT)
            if shift_ptr is not None:
                n += raw_shift[i].to(tl.float32)
                n = _rounded(n, X if X == S else tl.float32, shift_ptr.dtype.element_ty, EXACT)
            normed += (n,)
        if quantum_ptr is not None:
            # Of numbers not below zero, the order is that of their bits, and NaN above all.
            largest = tl.abs(normed[0]).to(tl.int32, bitcast=True)
            for i in tl.static_range(1, DIMS[2]):
                largest = tl.maximum(largest, tl.abs(normed[i]).to(tl.int32, bitcast=True))
            largest = tl.max(largest, 1, keep_dims=True).to(tl.float32, bitcast=True)
            quantum = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, tl.full(largest.shape, E4M3_LARGEST, tl.float32)))
            tl.store(quantum_ptr + token, quantum, mask=there)
            quotients = ()
            for i in tl.static_range(DIMS[2]):
                quotients += (tl.div_rn(normed[i], tl.broadcast_to(quantum, normed[i].shape)),)
            normed = quotients
        _store_all(normed_ptr + token * DIMS[0], normed, there, DIMS)


@triton.jit(do_not_specialize=["chunk", "tokens"])
def norm_backward(
    d_ptr, dout_ptr, x_ptr, y_ptr, gate_ptr, rows_ptr, scale_ptr, weight_ptr, order_ptr, starts_ptr, chunk_starts_ptr, owners_ptr,
    dx_ptr, dy_ptr, sums_ptr, stride_d, stride_dout, stride_x, stride_y, stride_gate, stride_scale, eps, chunk, tokens,
    NORM: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, LAYER: tl.constexpr, TANH: tl.constexpr, DIMS,
):  # fmt: skip
    """The tokens of a chunk: the gradients of x and y, and the sums over them, (chunks, sums, channels), those of the norm if there is one,
    and that of the gate if there is y. d is the gradient of the norm, x what it read and dout the gradient of that; without a norm d is
    dout.
    """
    if owners_ptr is None:
        first = tl.program_id(0).to(tl.int64) * chunk
        stop = tl.minimum(first + chunk, tokens)
    else:
        owner = tl.load(owners_ptr + tl.program_id(0))
        first = tl.load(starts_ptr + owner) + (tl.program_id(0) - tl.load(chunk_starts_ptr + owner)) * chunk
        stop = tl.minimum(first + chunk, tl.load(starts_ptr + owner + 1))
    a, b, g = (), (), ()
    for _ in tl.static_range(DIMS[2]):
        a += (tl.zeros([TOKENS, DIMS[1]], tl.float32),)
        b += (tl.zeros([TOKENS, DIMS[1]], tl.float32),)
        g += (tl.zeros([TOKENS, DIMS[1]], tl.float32),)
    for start in range(first, stop, TOKENS):
        token = start + tl.arange(0, TOKENS)[:, None]
        there = None if TOKENS == 1 else token < stop
        if order_ptr is not None:
            token = _look_up(order_ptr, token, there)
        row = token if rows_ptr is None else _look_up(rows_ptr, token, there)
        # At once, so that a token waits for memory once. y is awaited during the second sums: together they would not fit the registers.
        raw_d = _fetch(d_ptr + token * (stride_d * UNIT), there, DIMS)
        if NORM:
            raw_x = _fetch(x_ptr + token * (stride_x * UNIT), there, DIMS)
        if dout_ptr is not None:
            raw_dout = _fetch(dout_ptr + token * (stride_dout * UNIT), there, DIMS)
        dx = ()
        if NORM:
            x, sum_a, sum_b = (), (), ()
            for i in tl.static_range(DIMS[2]):
                x += (raw_x[i].to(tl.float32),)
            # Finite in rows that are not there, for the sums.
            x, rstd = _normalise(x, eps if there is None else tl.where(there, eps, 1.0), LAYER, DIMS)
            for i in tl.static_range(DIMS[2]):
                d = raw_d[i].to(tl.float32)
                if sums_ptr is not None:
                    sum_a += (a[i] + d,)
                    sum_b += (b[i] + d * x[i],)
                if scale_ptr is not None:
                    d *= 1.0 + _load(scale_ptr + row * (stride_scale * UNIT), there, i, DIMS)
                if weight_ptr is not None:
                    d *= _load(weight_ptr, None, i, DIMS)
                dx += (d,)
            if sums_ptr is not None:
                a, b = sum_a, sum_b
        if y_ptr is not None:
            raw_y = _fetch(y_ptr + token * (stride_y * UNIT), there, DIMS)
        if dx_ptr is not None or dy_ptr is not None or y_ptr is not None:
            if NORM:
                along = _mean(_products(dx, x, DIMS), DIMS)
                mean = _mean(dx, DIMS) if LAYER else 0.0
            dout, sum_g, dy = (), (), ()
            for i in tl.static_range(DIMS[2]):
                if NORM:
                    d = rstd * (dx[i] - mean - x[i] * along)
                    if dout_ptr is not None:
                        d += raw_dout[i].to(tl.float32)
                else:
                    d = raw_d[i].to(tl.float32)
                if y_ptr is not None:
                    sum_g += (g[i] + d * raw_y[i].to(tl.float32),)
                if dy_ptr is not None:
                    gate = _load(gate_ptr + row * (stride_gate * UNIT), there, i, DIMS)
                    dy += ((d * (_tanh(gate) if TANH else gate)).to(dy_ptr.dtype.element_ty),)
                dout += (d,)
            if y_ptr is not None:
                g = sum_g
            if dx_ptr is not None:
                _store_all(dx_ptr + token * DIMS[0], dout, there, DIMS)
            if dy_ptr is not None:
                _store_all(dy_ptr + token * DIMS[0], dy, there, DIMS)
    if sums_ptr is not None:
        KINDS: tl.constexpr = (2 if NORM else 0) + (1 if y_ptr is not None else 0)
        sums_ptr += tl.program_id(0).to(tl.int64) * (KINDS * DIMS[0])
        used = first < stop
        for i in tl.static_range(DIMS[2]):
            if NORM:
                _store(sums_ptr, tl.sum(a[i], 0, keep_dims=True), used, i, DIMS)
                _store(sums_ptr + DIMS[0], tl.sum(b[i], 0, keep_dims=True), used, i, DIMS)
            if y_ptr is not None:
                _store(sums_ptr + (KINDS - 1) * DIMS[0], tl.sum(g[i], 0, keep_dims=True), used, i, DIMS)


@triton.jit(do_not_specialize=["chunks"])
def sum_chunks(
    sums_ptr, chunk_starts_ptr, gate_ptr, weight_ptr, bias_ptr, dgate_ptr, dshift_ptr, dscale_ptr, a_ptr, b_ptr, stride_gate, chunks,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, KINDS: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of a row of the tables: the sums over its chunks, or over all without chunk_starts, and what follows from them."""
    row = tl.program_id(0).to(tl.int64) // tl.cdiv(CHANNELS, BLOCK)
    c = tl.program_id(0) % tl.cdiv(CHANNELS, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    if chunk_starts_ptr is None:
        first, stop = row, chunks.to(tl.int64)
    else:
        first, stop = tl.load(chunk_starts_ptr + row), tl.load(chunk_starts_ptr + row + 1)
    a, b, g = (tl.zeros([STEP, BLOCK], tl.float32),) * 3
    for start in range(first, stop, STEP):
        chunk = start + tl.arange(0, STEP)[:, None]
        there = (chunk < stop) & (c < CHANNELS)[None, :]
        pointers = sums_ptr + chunk * (KINDS * CHANNELS) + c[None, :]
        if KINDS > 1:
            a += tl.load(pointers, mask=there, other=0.0)
            b += tl.load(pointers + CHANNELS, mask=there, other=0.0)
        if KINDS != 2:
            g += tl.load(pointers + (KINDS - 1) * CHANNELS, mask=there, other=0.0)
    a, b, g, there, at = tl.sum(a, 0), tl.sum(b, 0), tl.sum(g, 0), c < CHANNELS, row * CHANNELS + c
    if dgate_ptr is not None:
        if TANH:
            t = _tanh(tl.load(gate_ptr + row * stride_gate + c, mask=there, other=0.0).to(tl.float32))
            g *= 1.0 - t * t
        tl.store(dgate_ptr + at, g.to(dgate_ptr.dtype.element_ty), mask=there)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + at, a.to(dshift_ptr.dtype.element_ty), mask=there)
    if dscale_ptr is not None:
        dscale = b
        if weight_ptr is not None:
            dscale *= tl.load(weight_ptr + c, mask=there, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            dscale += tl.load(bias_ptr + c, mask=there, other=0.0).to(tl.float32) * a
        tl.store(dscale_ptr + at, dscale.to(dscale_ptr.dtype.element_ty), mask=there)
    if a_ptr is not None:
        tl.store(a_ptr + at, a, mask=there)
        tl.store(b_ptr + at, b, mask=there)


def unavailable(x: torch.Tensor, fp8: bool, **others: torch.Tensor | None) -> str | None:
    """Why the kernels cannot run on these where torch can, if they cannot; x as the others, by their names."""
    if not 1 <= x.shape[1] <= LARGEST_CHANNELS:
        return f"{x.shape[1]} channels are not from 1 to {LARGEST_CHANNELS}"
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}"
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"the channels of {name} are {tensor.stride(-1)} numbers apart, not one"
    if fp8 and x.device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(x.device) < FIRST_WITH_FP8):
        return "this GPU has no E4M3"
    return None


@cache
def tile(channels: int, most_parts: int, lanes: int) -> dict:
    """How a kernel is launched that splits a token into at most so many parts: narrow parts, so that few threads share a token, but at
    least 64 channels, at most 4096; four warps, or as many as a part needs; and as many tokens as give them 16 bytes of bfloat16 each, or
    up to four times that where a token is narrow, twice for sums.
    """
    part = 64
    while part < min(channels, 4096) and most_parts * part < channels:
        part *= 2
    parts, at_once = cdiv(channels, part), 8 * lanes
    num_warps = max(4, part // at_once)
    tokens = max(num_warps * at_once // part, (4096 if most_parts == PARTS else 2048) // (part * triton.next_power_of_2(parts)))
    return {"DIMS": (channels, part, parts), "TOKENS": tokens, "num_warps": num_warps}


def chunk_size(at_once: int) -> int:
    """The tokens whose sums are one chunk's, of a kernel that takes so many at once."""
    return max(32, 16 * at_once)


def _unit(*tensors: torch.Tensor | None) -> int:
    """8 if all strides of rows are multiples of it, else 1. In this unit kernels take them: the compiler looks for multiples of 16."""
    return 8 if all(x is None or x.stride(0) % 8 == 0 for x in tensors) else 1


def _strides(unit: int, *tensors: torch.Tensor | None) -> list[int]:
    return [0 if x is None else x.stride(0) // unit for x in tensors]


def norm_fused(op, x, y, gate, rows, shift, scale, weight, bias, kind, eps, tanh_gate, fp8, exact):
    """(x + gate * y, or None without y; its norm, or None without a kind; the scales of that, or None without FP8)."""
    tokens, rows = x.shape[0], None if rows is None else rows.contiguous()
    out = None if y is None else x.new_empty(x.shape)
    normed = None if kind is None else x.new_empty(x.shape, dtype=FP8 if fp8 else x.dtype)
    scales = x.new_empty(tokens, dtype=torch.float32) if fp8 else None
    unit, how = _unit(x, y, gate, shift, scale), tile(x.shape[1], PARTS, lanes())
    launch(
        op, norm_forward, cdiv(tokens, how["TOKENS"]), x, y, gate, rows, shift, scale, weight, bias, out, normed, scales,
        *_strides(unit, x, y, gate, shift, scale), eps, tokens, UNIT=unit, LAYER=kind == "layer", TANH=tanh_gate, EXACT=exact, **how,
    )  # fmt: skip
    return out, normed, scales


def chunks_of_rows(rows: torch.Tensor, table_rows: int, size: int) -> tuple[torch.Tensor, ...]:
    """Tokens in the order of their rows; where each row starts among them, and in the chunks of `size` that its tokens fall into; and whose
    each chunk is: table_rows for those past the last, as their number is only bounded here.
    """
    rows, order = torch.sort(rows, stable=True)
    starts = torch.searchsorted(rows, torch.arange(table_rows + 2, dtype=rows.dtype, device=rows.device))
    chunk_starts = torch.nn.functional.pad(((starts.diff() + (size - 1)) // size).cumsum(0), (1, 0))
    most = min(len(rows), len(rows) // size + table_rows)
    owners = torch.searchsorted(chunk_starts[1:-1], torch.arange(most, device=rows.device), right=True)
    return order, starts, chunk_starts, owners


def norm_fused_backward(op, dnormed, dout, x, y, gate, rows, shift, scale, weight, bias, kind, eps, tanh_gate, y_dtype, wanted):
    """dx, dy, dgate, dshift, dscale, dweight, dbias, those that are wanted, of what `norm_fused` computes. x is what the norm read; it and
    all else of the norm are not used without dnormed, and y for dgate alone.
    """
    dnormed, dout = (d if d is None or d.shape[1] == 1 or d.stride(1) == 1 else d.contiguous() for d in (dnormed, dout))
    norm, rows = dnormed is not None, None if rows is None else rows.contiguous()
    d, dout = (dnormed, dout) if norm else (dout, None)
    x, scale, weight, bias = (each if norm else None for each in (x, scale, weight, bias))
    y, sums, kinds = y if wanted[2] else None, any(wanted[2:]), 2 * norm + wanted[2]
    tokens, channels = d.shape
    dx, dy = (d.new_empty(d.shape, dtype=dtype) if want else None for want, dtype in zip(wanted[:2], (d.dtype, y_dtype), strict=True))
    how = tile(channels, PARTS_OF_SUMS if sums else PARTS, lanes())
    at_once, table, table_rows = how["TOKENS"], (None,) * 4, 1
    chunk = chunk_size(at_once) if sums else at_once
    if sums and rows is not None:
        table_rows = next(len(each) for each in (gate, scale, shift) if each is not None)
        table = chunks_of_rows(rows, table_rows, chunk)
    elif sums:
        chunk = max(chunk, cdiv(cdiv(tokens, MOST_CHUNKS), at_once) * at_once)
    chunks = cdiv(tokens, chunk) if table[3] is None else len(table[3])
    partial = d.new_empty(chunks, kinds, channels, dtype=torch.float32) if sums else None
    unit = _unit(d, dout, x, y, gate, scale)
    launch(
        op, norm_backward, chunks, d, dout, x, y, gate, rows, scale, weight, *table, dx, dy, partial,
        *_strides(unit, d, dout, x, y, gate, scale), eps, chunk, tokens,
        NORM=norm, UNIT=unit, LAYER=kind == "layer", TANH=tanh_gate, **how,
    )  # fmt: skip
    if not sums:
        return dx, dy, None, None, None, None, None
    dgate, dshift, dscale = (
        torch.empty_like(each, memory_format=torch.contiguous_format) if want else None
        for want, each in zip(wanted[2:5], (gate, shift, scale), strict=True)
    )
    a, b = (d.new_empty(table_rows, channels, dtype=torch.float32) if any(wanted[5:]) else None for _ in range(2))
    launch(
        op, sum_chunks, table_rows * cdiv(channels, 32), partial, table[2], gate, weight, bias, dgate, dshift, dscale, a, b,
        0 if gate is None else gate.stride(0), chunks, CHANNELS=channels, BLOCK=32, STEP=64, KINDS=kinds, TANH=tanh_gate,
    )  # fmt: skip
    if a is not None and scale is not None:
        a, b = (each * (1 + scale.float()) for each in (a, b))
    dweight, dbias = (
        each.sum(0).to(parameter.dtype) if want else None for want, each, parameter in zip(wanted[5:], (b, a), (weight, bias), strict=True)
    )
    return dx, dy, dgate, dshift, dscale, dweight, dbias


def _or_empty(like: torch.Tensor, *results: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What an operator gives, which has no None."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _select(op: str, implementation: str, function):
    return select(op, implementation, {"triton": function}, {"gluon": NO_GLUON})


@as_operator("tubelet::modulated_norm")
def modulated_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
    fp8: bool,
    exact: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, scales), these empty but for FP8."""
    run = _select("modulated_norm", implementation, norm_fused)
    _, y, scales = run("modulated_norm", x, None, None, rows, shift, scale, weight, bias, kind, eps, False, fp8, exact)
    return y, scales if fp8 else x.new_empty(0, dtype=torch.float32)


@modulated_norm.register_fake
def _(x, shift, scale, rows, weight, bias, kind, eps, fp8, exact, implementation):
    return x.new_empty(x.shape, dtype=FP8 if fp8 else x.dtype), x.new_empty(x.shape[0] if fp8 else 0, dtype=torch.float32)


@as_operator("tubelet::gated_residual")
def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    rows: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str | None,
    eps: float,
    tanh_gate: bool,
    fp8: bool,
    exact: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x', its norm, the scales of that), empty where there is none; no norm if kind is None."""
    run = _select("gated_residual", implementation, norm_fused)
    out, normed, scales = run("gated_residual", x, y, gate, rows, shift, scale, weight, bias, kind, eps, tanh_gate, fp8, exact)
    return out, *_or_empty(x, normed), scales if fp8 else x.new_empty(0, dtype=torch.float32)


@gated_residual.register_fake
def _(x, y, gate, rows, shift, scale, weight, bias, kind, eps, tanh_gate, fp8, exact, implementation):
    normed = x.new_empty(0 if kind is None else x.shape, dtype=FP8 if fp8 else x.dtype)
    return x.new_empty(x.shape), normed, x.new_empty(x.shape[0] if fp8 else 0, dtype=torch.float32)


@as_operator("tubelet::gated_residual_backward")
def backward(
    dnormed: torch.Tensor | None,
    dout: torch.Tensor | None,
    x: torch.Tensor | None,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    rows: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str | None,
    eps: float,
    tanh_gate: bool,
    y_dtype: torch.dtype,
    wanted: list[bool],
    op: str,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """`norm_fused_backward` of either op, empty where nothing is wanted."""
    d = dout if dnormed is None else dnormed
    return _or_empty(
        d, *norm_fused_backward(op, dnormed, dout, x, y, gate, rows, shift, scale, weight, bias, kind, eps, tanh_gate, y_dtype, wanted)
    )


@backward.register_fake
def _(dnormed, dout, x, y, gate, rows, shift, scale, weight, bias, kind, eps, tanh_gate, y_dtype, wanted, op):
    d = dout if dnormed is None else dnormed
    likes = (d, d, gate, shift, scale, weight, bias)
    dtypes = (d.dtype, y_dtype, *(None if each is None else each.dtype for each in likes[2:]))
    return tuple(
        d.new_empty(like.shape, dtype=dtype) if want else d.new_empty(0) for want, like, dtype in zip(wanted, likes, dtypes, strict=True)
    )


def _save_norm(ctx, inputs, output) -> None:
    x, shift, scale, rows, weight, bias, kind, eps, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, shift, scale, rows, weight, bias)
    ctx.how = kind, eps


def _norm_backward(ctx, dy, _):
    if dy is None:
        return (None,) * 11
    x, shift, scale, rows, weight, bias = ctx.saved_tensors
    need = ctx.needs_input_grad
    wanted = [need[0], False, False, need[1], need[2], need[4], need[5]]
    kind, eps = ctx.how
    grads = backward(dy, None, x, None, None, rows, shift, scale, weight, bias, kind, eps, False, x.dtype, wanted, "modulated_norm")
    dx, _, _, dshift, dscale, dweight, dbias = (grad if want else None for want, grad in zip(wanted, grads, strict=True))
    return dx, dshift, dscale, None, dweight, dbias, *(None,) * 5


modulated_norm.register_autograd(_norm_backward, setup_context=_save_norm)


def _save_residual(ctx, inputs, output) -> None:
    _, y, gate, rows, shift, scale, weight, bias, kind, eps, tanh_gate, *_ = inputs
    ctx.set_materialize_grads(False)
    # x' is what the norm read but for its rounding, and lives on as the next x; y is there for the gradient of the gate alone.
    ctx.save_for_backward(output[0], y if ctx.needs_input_grad[2] else None, gate, rows, shift, scale, weight, bias)
    ctx.how = kind, eps, tanh_gate, y.dtype


def _residual_backward(ctx, dout, dnormed, _):
    if dout is None and dnormed is None:
        return (None,) * 14
    out, y, gate, rows, shift, scale, weight, bias = ctx.saved_tensors
    norm, need = dnormed is not None, ctx.needs_input_grad
    wanted = [
        norm and (need[0] or (need[1] and gate is None)), need[1] and gate is not None, need[2], *(norm and each for each in need[4:8]),
    ]  # fmt: skip
    grads = (None,) * 7
    if any(wanted):
        grads = backward(dnormed, dout, out, y, gate, rows, shift, scale, weight, bias, *ctx.how, wanted, "gated_residual")
    dx, dy, dgate, *rest = (grad if want else None for want, grad in zip(wanted, grads, strict=True))
    dx = dx if norm else dout
    dy = dx.to(ctx.how[3]) if gate is None and need[1] else dy
    return dx if need[0] else None, dy, dgate, None, *rest, *(None,) * 6


gated_residual.register_autograd(_residual_backward, setup_context=_save_residual)
