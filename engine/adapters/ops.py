"""The ops of `tubelet.kernels` as models with batches call them: tensors (batch, tokens, ...), which are packs of clips of equal size.

Nothing is copied: a batch is its tokens one after the other. Where a model pads texts to one length and hides the padding with a mask, the
mask becomes a number of tokens for each text, on the device: no mask of pairs exists and the host waits for nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tubelet.kernels import (
    Full,
    Mask,
    Modulation,
    VideoLayout,
    attention,
    final_layer,
    gated_residual,
    modulated_norm,
    patch_embed,
    qk_norm_rope,
)
from tubelet.kernels.dispatch import as_operator
from tubelet.kernels.masks import RuleMask

if TYPE_CHECKING:
    from .swaps import Swaps

MOST_TIMESTEPS = 256
"""Different timesteps of tokens in one call, or one for each frame if these are more."""

# ------------------------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Clip:
    """What each entry of a batch is on the token axis: `frames` frames of equal size and, at the end or with text_first at the beginning,
    `text` tokens that see, and are seen by, all.
    """

    frames: int = 1
    text: int = 0
    text_first: bool = False


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    swaps: "Swaps",
    mask: Mask | None = None,
    clip: Clip = Clip(),
    cross: bool = False,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of each entry of a batch to itself or, `cross`, to a text of its own: (batch, tokens, heads, head_dim) in q's dtype, or in
    that of autocast, which the library's attention gives too.

    q: (batch, tokens, heads, head_dim); k, v: (batch, keys, kv heads, head_dim), views of fused projections too. mask: Full by default.
    clip: what an entry is. lengths: int32 (batch,), of the keys of an entry's text, which are all if `cross`, how many are there, the rest
    being padding, see `lengths_of`.
    """
    text = k.shape[1] if cross else clip.text
    if lengths is not None and not text:
        raise ValueError(f"lengths: expected None without a text, got {tuple(lengths.shape)}")
    how = (clip.frames, clip.text, int(clip.text_first), int(cross))
    mask = Full() if mask is None else mask
    if torch.is_autocast_enabled(q.device.type) and q.dtype == torch.float32:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    implementation = _fastest(q, mask, lengths) if swaps.implementation == "auto" else swaps.implementation
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if torch.compiler.is_compiling():  # a layout is made of the sizes when the call runs
        return _operator(q, k, v, lengths, [int(n) for n in mask.as_rule()], mask.same_site, how, scale, implementation)
    return _attend(q, k, v, lengths, mask, how, scale, implementation)


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, mask: Mask, how: Sequence[int], scale, implementation: str) -> Tensor:
    batch, tokens = q.shape[:2]
    frames, text, text_first, cross = how
    layout = _layout(batch, tokens - text, frames, text, bool(text_first), q.device)
    kv_layout = _segments(batch, k.shape[1], q.device) if cross else None
    out = attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout, mask, kv_layout=kv_layout, text_lengths=lengths, scale=scale,
        implementation=implementation,
    )  # fmt: skip
    return out.unflatten(0, (batch, tokens))


@lru_cache(maxsize=4096)  # never so many: a captured graph may read the tables of any of them
def _layout(batch: int, video: int, frames: int, text: int, text_first: bool, device: torch.device) -> VideoLayout:
    if video % frames:
        raise ValueError(f"clip: expected frames of equal size, got {video} tokens in {frames} frames")
    if not video:
        return _segments(batch, text, device)
    return VideoLayout.pack([(frames, 1, video // frames)] * batch, text=[text] * batch, text_first=text_first, device=device)


@lru_cache(maxsize=4096)
def _segments(batch: int, length: int, device: torch.device) -> VideoLayout:
    return VideoLayout.segments([length] * batch, device=device)


def _fastest(q: Tensor, mask: Mask, lengths: Tensor | None) -> str:
    """On Hopper cuDNN is the faster one for whole clips of one size without padding (see the README's section on speed)."""
    plain = not mask.same_site and lengths is None and q.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None
    return "torch" if plain and q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) == (9, 0) else "auto"


@as_operator("tubelet::attend")
def _operator(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, rule: list[int], same_site: bool, how: list[int], scale: float | None,
    implementation: str,
) -> Tensor:  # fmt: skip
    return _attend(q, k, v, lengths, _mask(rule, same_site), how, scale, implementation).contiguous()


@_operator.register_fake
def _(q, k, v, lengths, rule, same_site, how, scale, implementation):
    return q.new_empty(q.shape)


@as_operator("tubelet::attend_backward")
def _operator_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, rule: list[int], same_site: bool, how: list[int],
    scale: float | None, implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The forward pass is run again: a graph keeps nothing of it."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = _attend(*leaves, lengths, _mask(rule, same_site), how, scale, implementation)
        return tuple(grad.contiguous() for grad in torch.autograd.grad(out, leaves, do))


@_operator_backward.register_fake
def _(do, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.how = inputs[4:]


def _backward(ctx, do):
    return *_operator_backward(do, *ctx.saved_tensors, *ctx.how), *[None] * 6


_operator.register_autograd(_backward, setup_context=_setup_context)


def _mask(rule: Sequence[int], same_site: bool) -> Mask:
    return RuleMask.of(rule, same_site)


def lengths_of(mask: Tensor | None) -> Tensor | None:
    """int32 (batch,), on the device, of a mask that hides the end of each text: how many tokens of it are there.

    mask: (batch, [1, ...,] tokens), bool, or of numbers with 1 for a token that is there, or added to scores, 0 for one that is there and
    very negative for one that is not; (batch, heads, tokens) and (batch, 1, queries, tokens) too, whose rows are taken to be alike. Without
    a look at its numbers none is known to hide an end alone: `ordered` also serves others.
    """
    if mask is None:
        return None
    seen = _seen(mask)
    lengths = seen.sum(dim=1, dtype=torch.int32)
    if mask.dtype == torch.bool or _of_ones(mask):
        return lengths
    return torch.where(lengths == 0, seen.shape[1], lengths)  # the same number added to all scores changes nothing


def _of_ones(mask: Tensor) -> bool:
    return not mask.is_floating_point()


def _seen(mask: Tensor) -> Tensor:
    mask = mask.reshape(mask.shape[0], -1, mask.shape[-1])[:, 0]
    return mask if mask.dtype == torch.bool else mask > 0 if _of_ones(mask) else mask > -1000


def ordered(mask: Tensor | None, *texts: Tensor) -> tuple[Tensor | None, ...]:
    """`lengths_of` a mask that may hide any tokens, and the texts (batch, tokens, ...) with what is there moved to the front, which is the
    same to attention without positions.
    """
    if mask is None:
        return None, *texts
    order = _seen(mask).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    entries = torch.arange(len(order), device=order.device)[:, None]
    return lengths_of(mask), *(text[entries, order] for text in texts)


# --------------------------------------------------------------------------------------------------------------------- norm and rotary


def norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    swaps: "Swaps",
    q_norm: nn.Module | None = None,
    k_norm: nn.Module | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    skip: tuple[int, int] = (0, 0),
    across_heads: bool = False,
    interleaved: bool = True,
    axes: Sequence[int] | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The model's norms of queries and keys, and its rotary positions, in one op. q, k: (batch, tokens, heads, head_dim), of other numbers
    of tokens too if nothing turns.

    q_norm, k_norm: RMSNorm or LayerNorm modules of any library (weight, bias, eps), over head_dim or across_heads; None or Identity for
    none. cos, sin: (tokens that turn, pairs) float32, one number for each pair, or (1 or batch, tokens that turn, [heads,] pairs), or with
    rows int32 (batch * tokens,) as in `qk_norm_rope`. skip: how many tokens at the beginning and at the end of an entry do not turn.
    interleaved, axes: as in `qk_norm_rope`.
    """
    batch, tokens = q.shape[:2]
    if cos is not None:  # FSDP2 may have cast what goes into a block
        cos, sin = cos.float(), sin.float()
    if cos is not None and rows is None:
        own = cos.dim() > 2 and len(cos) > 1
        if cos.dim() > 2:
            cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        if batch > 1 or any(skip):
            rows = once(_rotary_rows, batch, tokens, skip, own, q.device)
    (kind, q_weight, q_bias, eps), (_, k_weight, k_bias, _) = (_norm(norm) for norm in (q_norm, k_norm))
    q2, k2 = qk_norm_rope(
        q.flatten(0, 1), k.flatten(0, 1), q_weight, k_weight, cos, sin, q_bias=q_bias, k_bias=k_bias, norm=kind, across_heads=across_heads,
        interleaved=interleaved, axes=axes, rows=rows, eps=eps, implementation=swaps.implementation,
    )  # fmt: skip
    return q2.unflatten(0, (batch, tokens)), k2.unflatten(0, k.shape[:2])


def _norm(norm: nn.Module | None) -> tuple[str | None, Tensor | None, Tensor | None, float]:
    """Kind, weight, bias and eps of a norm module, whichever library it is of."""
    if norm is None or isinstance(norm, nn.Identity):
        return None, None, None, 1e-6
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon  # so called in transformers, and in models after its
    eps = torch.finfo(torch.float32).eps if eps is None else eps  # torch's RMSNorm without one
    return kind, getattr(norm, "weight", None), getattr(norm, "bias", None), eps


def _rotary_rows(batch: int, tokens: int, skip: tuple[int, int], own: bool, device: torch.device) -> Tensor:
    """The row of each token in a table: its place, or with tables of its entry's `own` entry and place; -1 for one that does not turn."""
    turning = tokens - sum(skip)
    rows = torch.arange(batch * turning if own else turning, device=device, dtype=torch.int32)
    rows = rows.view(batch, turning) if own else rows.expand(batch, turning)
    return nn.functional.pad(rows, skip, value=-1).flatten()


# ------------------------------------------------------------------------------------------------------------------ norms, modulation


def promoted(x: Tensor, other: Tensor) -> Tensor:
    """x in the dtype of a sum with what comes of another: under autocast that of a gate of tables in float32."""
    return x.to(torch.promote_types(x.dtype, other.dtype))


def modulate(
    x: Tensor, norm: nn.Module, shift: Tensor | None = None, scale: Tensor | None = None, *, swaps: "Swaps", fp8: bool = False,
    rows: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """norm(x) * (1 + scale) + shift of x (batch, tokens, channels), in x's dtype.

    norm: the model's module, whose weight, bias and eps are read. shift, scale: (1 or batch, channels), or (1 or batch, n, channels) for n
    stretches of equal length, such as frames; or with rows int32 (batch * tokens,), the row of each token, (n, channels). fp8: E4M3 and the
    scales of its rows.
    """
    shift, scale = _of_batch(x, rows, shift, scale)
    table = _modulation(norm, shift, scale)
    y = modulated_norm(
        x.flatten(0, 1), table.shift, table.scale, _rows(x, rows, shift, scale), kind=table.kind, weight=table.weight, bias=table.bias,
        eps=table.eps, fp8=fp8, implementation=swaps.implementation,
    )  # fmt: skip
    return _unflatten(y, x)


def gate(x: Tensor, y: Tensor, gate: Tensor | None = None, *, swaps: "Swaps", tanh: bool = False, rows: Tensor | None = None) -> Tensor:
    """x + gate * y, (batch, tokens, channels); gate as shift and scale in `modulate`."""
    (gate,) = _of_batch(x, rows, gate)
    out = gated_residual(
        x.flatten(0, 1), y.flatten(0, 1), _flat(gate), _rows(x, rows, gate), tanh_gate=tanh, implementation=swaps.implementation
    )
    return out.unflatten(0, x.shape[:2])


def gate_and_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, norm: nn.Module, shift: Tensor | None = None, scale: Tensor | None = None, *,
    swaps: "Swaps", tanh: bool = False, fp8: bool = False, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:  # fmt: skip
    """`gate`, and `modulate` of its result, in one pass."""
    gate, shift, scale = _of_batch(x, rows, gate, shift, scale)
    given = [each for each in (gate, shift, scale) if each is not None]
    counts = {1 if each.dim() == 2 else each.shape[1] for each in given}
    if rows is None and len(counts) > 1:  # a gate for each clip beside a modulation for each frame
        most = max(counts)
        gate, shift, scale = (
            None if each is None else each.reshape(len(each), -1, each.shape[-1]).expand(-1, most, -1) for each in (gate, shift, scale)
        )
    out, normed = gated_residual(
        x.flatten(0, 1), y.flatten(0, 1), _flat(gate), _rows(x, rows, gate, shift, scale), norm=_modulation(norm, shift, scale),
        tanh_gate=tanh, fp8=fp8, implementation=swaps.implementation,
    )  # fmt: skip
    return out.unflatten(0, x.shape[:2]), _unflatten(normed, x)


def project(
    x: Tensor, linear: nn.Linear, norm: nn.Module, shift: Tensor | None, scale: Tensor | None, *, swaps: "Swaps",
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`modulate` and the model's last projection, in one op if that is a plain linear: (batch, tokens, its channels)."""
    if type(linear) is not nn.Linear or swaps.refusal(linear, "weight", "bias"):  # as `Swaps.last_layer` writes down
        return linear(modulate(x, norm, shift, scale, swaps=swaps, rows=rows))
    shift, scale = _of_batch(x, rows, shift, scale)
    out = final_layer(
        x.flatten(0, 1), linear.weight, linear.bias, norm=_modulation(norm, shift, scale), rows=_rows(x, rows, shift, scale),
        implementation=swaps.implementation,
    )  # fmt: skip
    return out.unflatten(0, x.shape[:2])


def _modulation(norm: nn.Module, shift: Tensor | None, scale: Tensor | None) -> Modulation:
    kind, weight, bias, eps = _norm(norm)
    return Modulation(_flat(shift), _flat(scale), kind, weight, bias, eps)


def _of_batch(x: Tensor, rows: Tensor | None, *tables: Tensor | None) -> list[Tensor | None]:
    """Tables of a batch, also those of one timestep for all of its entries."""
    return [table if table is None or rows is not None else table.expand(len(x), *table.shape[1:]) for table in tables]


def _flat(table: Tensor | None) -> Tensor | None:
    return table if table is None or table.dim() == 2 else table.flatten(0, 1)


def _rows(x: Tensor, rows: Tensor | None, *tables: Tensor | None) -> Tensor | None:
    """The row of each token in tables of equal numbers of rows, int32 (batch * tokens,)."""
    given = [table for table in tables if table is not None]
    if rows is not None or not given:
        return rows
    batch, tokens = x.shape[:2]
    number = batch if given[0].dim() == 2 else given[0].shape[0] * given[0].shape[1]
    if batch * tokens % number:
        raise ValueError(f"x: expected a multiple of {number // batch} tokens, as there are rows of modulation, got {tokens}")
    return once(_equal_rows, number, batch * tokens // number, x.device)


def _equal_rows(number: int, each: int, device: torch.device) -> Tensor:
    return torch.arange(number, device=device, dtype=torch.int32).repeat_interleave(each)


def _unflatten(y: Tensor | tuple[Tensor, Tensor], x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(y, tuple):
        return tuple(each.unflatten(0, x.shape[:2]) for each in y)
    return y.unflatten(0, x.shape[:2])


# ------------------------------------------------------------------------------------------------------------------------------ patches


def embed(conv: nn.Module, x: Tensor, *, swaps: "Swaps") -> Tensor:
    """The tokens of a patch embedding that the model does with a convolution whose stride is its kernel: x (batch, channels, [T,] H, W) to
    (batch, dim, [t,] h, w), a view of tokens (batch, tokens, dim), which are what the model makes of it next.

    Pixels past the last whole patch are left out, as by the convolution.
    """
    flat = x.dim() == 4
    patch = (1, *conv.kernel_size) if flat else tuple(conv.kernel_size)
    x = x.transpose(0, 1)[None] if flat else x  # images are the frames of one clip
    grid = tuple(side // p for side, p in zip(x.shape[2:], patch, strict=True))
    clips = [clip[:, : grid[0] * patch[0], : grid[1] * patch[1], : grid[2] * patch[2]] for clip in x.unbind(0)]
    tokens = patch_embed(clips, conv.weight.flatten(1), conv.bias, patch=patch, implementation=swaps.implementation)
    out = tokens.view(len(clips), *grid, -1).permute(0, 4, 1, 2, 3)
    return out[0].transpose(0, 1) if flat else out


def is_patching(conv: nn.Module) -> bool:
    """Whether a convolution does nothing but multiply patches that do not overlap."""
    plain = type(conv) in (nn.Conv2d, nn.Conv3d) and tuple(conv.stride) == tuple(conv.kernel_size) and conv.groups == 1
    return plain and all(d == 1 for d in conv.dilation) and conv.padding_mode == "zeros" and not any(conv.padding)


def unpatch(x: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Patches (batch, tokens, pixels * channels) to (batch, channels, T, H, W)."""
    x = x.unflatten(1, grid).unflatten(-1, (*patch, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


# ------------------------------------------------------------------------------------------------------------------------------- shared


def checkpointed(model: nn.Module, layer: nn.Module, *arguments):
    """layer(*arguments), as a gradient checkpoint if the model has them switched on."""
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        return model._gradient_checkpointing_func(layer, *arguments)
    return layer(*arguments)


def distinct(timestep: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """The timesteps that differ of those of tokens, which may have any shape, in a table of fixed size: MOST_TIMESTEPS, or `frames` if
    these are more; and the row of each token, int32 (tokens of all entries,). The host does not wait; more timesteps than that raise
    RuntimeError, on a GPU as an assertion of the device.
    """
    values, order = timestep.flatten().sort()
    most = min(max(MOST_TIMESTEPS, frames), len(values))
    row = nn.functional.pad((values[1:] != values[:-1]).cumsum(0), (1, 0))
    torch._assert_async(row[-1] < most, f"timestep: expected at most {most} different ones of tokens in a call")
    row = row.clamp(max=most - 1)
    table = values[:1].expand(most).clone().index_put((row,), values)
    return table, torch.empty_like(row, dtype=torch.int32).scatter(0, order, row.int())


def once(function: Callable, *arguments):
    """function(*arguments), of numbers and a device, remembered; a graph that is compiled computes it."""
    return function(*arguments) if torch.compiler.is_compiling() else _remembered(function, *arguments)


@lru_cache(maxsize=4096)
def _remembered(function: Callable, *arguments):
    with torch.inference_mode(False):
        return function(*arguments)


def half_tables(function: Callable) -> Callable:
    """Remember what function(cos, sin) made of the last tables it was given: all blocks of a model are given the same."""
    last: list = [None, None]

    @wraps(function)
    def remembering(cos: Tensor, sin: Tensor):
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and cos.requires_grad):
            return function(cos, sin)
        capturing = cos.is_cuda and torch.cuda.is_current_stream_capturing()
        key = cos, sin, cos._version if not cos.is_inference() else None, capturing
        if last[0] is None or any(a is not b for a, b in zip(last[0][:2], key[:2], strict=True)) or last[0][2:] != key[2:]:
            with torch.inference_mode(cos.is_inference()):  # what is made of others may be asked for again by a backward pass
                last[:] = key, function(cos, sin)
        return last[1]

    return remembering


@half_tables
def repeated_neighbours(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables that hold each angle twice, side by side (..., 2 pairs), as tables of pairs (..., pairs), float32."""
    return tuple(table[..., ::2].float().contiguous() for table in (cos, sin))


@half_tables
def repeated_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables that hold the row of angles twice (..., 2 pairs), as tables of pairs (..., pairs), float32."""
    return tuple(table[..., : table.shape[-1] // 2].float().contiguous() for table in (cos, sin))
