"""Queries and keys normalised and turned where they are loaded, and the way back for their gradients: what `rotary` does in a pass of its
own over both.

    x' = R(angle) (x r w),   r = 1 / sqrt(mean x^2 + eps)      of each row; for a layer norm x less its mean in place of x
    dx = r (g - xhat mean(g xhat)),   g = w R(-angle) dx',   xhat = x r,   dw = sum over rows of xhat R(-angle) dx'

TURN is None, where nothing is to be done, or a `Turn`. Pairs of channels that are neighbours are in one thread.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..rotary import NormRope

NORMS = {None: 0, "rms": 1, "layer": 2}
LAYER = tl.constexpr(NORMS["layer"])


class Turn(NamedTuple):
    """What is done to queries, or to keys. weight: (head dim). weight_gradient: where the sums of it over the rows of each program go,
    (programs, head dim). cos, sin: (rows, pairs), rows `stride` apart. rows: the row of each token, -1 for none; else it is its number.
    The rest are constants: which of these there are, 0 in place of the others (Triton 3.6 cannot compare a tuple with a None in it), the
    norm, of NORMS, and whether pairs of channels are neighbours.
    """

    weight: torch.Tensor | int
    weight_gradient: torch.Tensor | int
    cos: torch.Tensor | int
    sin: torch.Tensor | int
    rows: torch.Tensor | int
    stride: int
    eps: float
    has_weight: tl.constexpr
    has_weight_gradient: tl.constexpr
    has_rows: tl.constexpr
    pairs: tl.constexpr
    norm: tl.constexpr
    interleaved: tl.constexpr

    @classmethod
    def of(cls, weight: torch.Tensor | None, how: NormRope, weight_gradient: torch.Tensor | None = None) -> "Turn":
        pairs, stride = (0, 0) if how.cos is None else (how.cos.shape[1], how.cos.stride(0))
        weight = None if weight is None else weight.contiguous()
        given = weight, weight_gradient, how.cos, how.sin, None if how.rows is None else how.rows.contiguous()
        there = (each is not None for each in (weight, weight_gradient, how.rows))
        constants = (tl.constexpr(value) for value in (*there, pairs, NORMS[how.norm], how.interleaved))
        return cls(*(0 if each is None else each for each in given), stride, how.eps, *constants)


@triton.jit
def _inner(a, b, DIMS):
    """The inner products of rows."""
    s = tl.sum(a[0] * b[0], 1)
    if DIMS[2] > 0:
        s += tl.sum(a[1] * b[1], 1)
    if DIMS[3] > 0:
        s += tl.sum(a[2] * b[2], 1)
    return s


@triton.jit
def _less_mean(x, DIMS):
    """x less the mean of each row, zeros past the head dim."""
    total = tl.sum(x[0], 1)
    if DIMS[2] > 0:
        total += tl.sum(x[1], 1)
    if DIMS[3] > 0:
        total += tl.sum(x[2], 1)
    mean = (total / DIMS[0])[:, None]
    y = (_within(x[0] - mean, 0, DIMS[1], DIMS),)
    if DIMS[2] > 0:
        y += (_within(x[1] - mean, DIMS[1], DIMS[2], DIMS),)
    if DIMS[3] > 0:
        y += (_within(x[2] - mean, DIMS[1] + DIMS[2], DIMS[3], DIMS),)
    return y


@triton.jit
def _within(x, START: tl.constexpr, SIZE: tl.constexpr, DIMS):
    if DIMS[0] < START + SIZE:
        x = tl.where((START + tl.arange(0, SIZE) < DIMS[0])[None, :], x, 0.0)
    return x


@triton.jit
def _normalise(x, there, TURN, DIMS):
    """xhat and 1 / r of rows, float32; zeros for rows that are not there."""
    y = (x[0].to(tl.float32),)
    if DIMS[2] > 0:
        y += (x[1].to(tl.float32),)
    if DIMS[3] > 0:
        y += (x[2].to(tl.float32),)
    r = tl.where(there, 1.0, 0.0)
    if TURN.norm > 0:
        if TURN.norm == LAYER:
            y = _less_mean(y, DIMS)
        r = tl.where(there, 1.0 / tl.sqrt(_inner(y, y, DIMS) / DIMS[0] + TURN.eps), 0.0)
        z = (y[0] * r[:, None],)
        if DIMS[2] > 0:
            z += (y[1] * r[:, None],)
        if DIMS[3] > 0:
            z += (y[2] * r[:, None],)
        y = z
    return y, r


@triton.jit
def _weigh_part(x, START: tl.constexpr, SIZE: tl.constexpr, TURN, DIMS):
    d = START + tl.arange(0, SIZE)
    return x * tl.load(TURN.weight + d, mask=d < DIMS[0], other=0.0).to(tl.float32)[None, :]


@triton.jit
def _weigh(x, TURN, DIMS):
    y = x
    if TURN.has_weight:
        y = (_weigh_part(x[0], 0, DIMS[1], TURN, DIMS),)
        if DIMS[2] > 0:
            y += (_weigh_part(x[1], DIMS[1], DIMS[2], TURN, DIMS),)
        if DIMS[3] > 0:
            y += (_weigh_part(x[2], DIMS[1] + DIMS[2], DIMS[3], TURN, DIMS),)
    return y


@triton.jit
def _turn_part(x, tokens, there, SIGN: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, TURN):
    y = x
    if 2 * TURN.pairs > START:
        ROWS: tl.constexpr = x.shape[0]
        HALF: tl.constexpr = SIZE // 2
        row, turns = tokens, there
        if TURN.has_rows:
            row = tl.load(TURN.rows + tokens, mask=there, other=-1).to(tl.int64)
            turns = row >= 0
        pair = START // 2 + tl.arange(0, HALF)
        where = row[:, None] * TURN.stride + pair[None, :]
        has = turns[:, None] & (pair < TURN.pairs)[None, :]
        cos = tl.load(TURN.cos + where, mask=has, other=1.0)
        sin = tl.load(TURN.sin + where, mask=has, other=0.0) * SIGN
        if TURN.interleaved:
            a, b = tl.split(tl.reshape(x, [ROWS, HALF, 2]))
            y = tl.reshape(tl.join(a * cos - b * sin, tl.fma(a, sin, b * cos)), [ROWS, SIZE])
        else:
            a, b = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), (0, 2, 1)))
            y = tl.reshape(tl.permute(tl.join(a * cos - b * sin, tl.fma(a, sin, b * cos)), (0, 2, 1)), [ROWS, SIZE])
    return y


@triton.jit
def _turn(x, tokens, there, SIGN: tl.constexpr, TURN, DIMS):
    """Rows turned by their angles, or with SIGN -1 back."""
    y = x
    if TURN.pairs > 0:
        y = (_turn_part(x[0], tokens, there, SIGN, 0, DIMS[1], TURN),)
        if DIMS[2] > 0:
            y += (_turn_part(x[1], tokens, there, SIGN, DIMS[1], DIMS[2], TURN),)
        if DIMS[3] > 0:
            y += (_turn_part(x[2], tokens, there, SIGN, DIMS[1] + DIMS[2], DIMS[3], TURN),)
    return y


@triton.jit
def norm_rope(x, tokens, there, TURN, DIMS):
    """Loaded rows of queries or keys as the products take them, in their dtype; as they are if TURN is None."""
    if TURN is not None:
        y, _r = _normalise(x, there, TURN, DIMS)
        y = _turn(_weigh(y, TURN, DIMS), tokens.to(tl.int64), there, 1, TURN, DIMS)
        z = (y[0].to(x[0].dtype),)
        if DIMS[2] > 0:
            z += (y[1].to(x[0].dtype),)
        if DIMS[3] > 0:
            z += (y[2].to(x[0].dtype),)
        x = z
    return x


@triton.jit
def norm_rope_backward(g, x, tokens, there, TURN, DIMS):
    """The gradients of rows x, as loaded, from those of what `norm_rope` made of them, and of the weight, summed over the rows: float32."""
    g = _turn(g, tokens.to(tl.int64), there, -1, TURN, DIMS)
    y, r = _normalise(x, there, TURN, DIMS)
    dw = (tl.sum(g[0] * y[0], 0),)
    if DIMS[2] > 0:
        dw += (tl.sum(g[1] * y[1], 0),)
    if DIMS[3] > 0:
        dw += (tl.sum(g[2] * y[2], 0),)
    g = _weigh(g, TURN, DIMS)
    if TURN.norm > 0:
        if TURN.norm == LAYER:
            g = _less_mean(g, DIMS)
        along = (_inner(g, y, DIMS) / DIMS[0])[:, None]
        h = ((g[0] - y[0] * along) * r[:, None],)
        if DIMS[2] > 0:
            h += ((g[1] - y[1] * along) * r[:, None],)
        if DIMS[3] > 0:
            h += ((g[2] - y[2] * along) * r[:, None],)
        g = h
    return g, dw


@triton.jit
def no_weight_gradient(DIMS):
    dw = (tl.zeros([DIMS[1]], tl.float32),)
    if DIMS[2] > 0:
        dw += (tl.zeros([DIMS[2]], tl.float32),)
    if DIMS[3] > 0:
        dw += (tl.zeros([DIMS[3]], tl.float32),)
    return dw


@triton.jit
def add_weight_gradient(dw, more, DIMS):
    y = (dw[0] + more[0],)
    if DIMS[2] > 0:
        y += (dw[1] + more[1],)
    if DIMS[3] > 0:
        y += (dw[2] + more[2],)
    return y


@triton.jit
def store_weight_gradient(dw, TURN, DIMS):
    """Of this program."""
    if TURN.has_weight_gradient:
        _store_vector(dw[0], 0, DIMS[1], TURN, DIMS)
        if DIMS[2] > 0:
            _store_vector(dw[1], DIMS[1], DIMS[2], TURN, DIMS)
        if DIMS[3] > 0:
            _store_vector(dw[2], DIMS[1] + DIMS[2], DIMS[3], TURN, DIMS)


@triton.jit
def _store_vector(x, START: tl.constexpr, SIZE: tl.constexpr, TURN, DIMS):
    d = START + tl.arange(0, SIZE)
    tl.store(TURN.weight_gradient + tl.program_id(0).to(tl.int64) * DIMS[0] + d, x, mask=d < DIMS[0])


class Turns:
    """Those of the launches of a call, and the gradients of the weights that launches backwards leave, of head dim `head_dim`."""

    def __init__(self, how: NormRope | None, head_dim: int):
        self.how, self.head_dim = how, head_dim
        self.sums: tuple[list, list] = [], []

    def __call__(self, programs: int = 0, queries: bool = False, keys: bool = False) -> tuple[Turn | None, Turn | None]:
        """Of queries and of keys; a launch of so many programs gives the gradient of the weight of either or both."""
        if self.how is None:
            return None, None
        turns = []
        for weight, wanted, sums in zip((self.how.q_weight, self.how.k_weight), (queries, keys), self.sums, strict=True):
            gradient = None
            if wanted and weight is not None:
                gradient = torch.zeros(programs, self.head_dim, dtype=torch.float32, device=weight.device)
                sums.append(gradient)
            turns.append(Turn.of(weight, self.how, gradient))
        return tuple(turns)

    def weight_gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Of queries and of keys, None where there is no weight; neither if nothing is done to them."""
        weights = () if self.how is None else (self.how.q_weight, self.how.k_weight)
        return tuple(
            None if weight is None else sum(part.sum(0) for part in sums).to(weight.dtype)
            for weight, sums in zip(weights, self.sums, strict=False)
        )
