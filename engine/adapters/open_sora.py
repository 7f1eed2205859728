"""Open-Sora 1.2 (Zheng et al. 2024): STDiT3 of their own repository, whose blocks attend in turn within frames and along time.

What is computed otherwise than there: tokens stay where they are, (batch, frames * sites, channels), through both kinds of blocks. Where
frames are known beforehand, and have a timestep of zero, their modulation is another row of a table, and nothing is normalised twice.
Nothing of that repository is imported.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature

import torch
from torch import Tensor, nn
from tubelet.kernels import Full, Spatial, Temporal, VideoLayout, attention

from . import ops
from .fp8 import Rows, takes
from .swaps import Swaps

ARGUMENTS = ("self", "x", "y", "t", "mask", "x_mask", "t0", "T", "S")
"""Of the forward of a block."""


def swap(swaps: Swaps) -> None:
    """Serve an STDiT3."""
    swaps.patches("x_embedder.proj")
    for where, module in list(swaps.model.named_modules()):
        if any(kind.__name__ == "STDiT3Block" for kind in type(module).__mro__):
            swap_block(swaps, where)
    if swaps.forward("final_layer", final_layer, {"norm, modulation, projection": ("final_layer",)}, "scale_shift_table"):
        swaps.last_layer("final_layer.norm_final", "final_layer.linear")


def swap_block(swaps: Swaps, where: str) -> None:
    """Serve a block and the two attention modules in it."""
    module = swaps.module(where)
    swaps.linears(where)
    reason, parts = unknown(module), {"attn": ("attention", "qk_norm_rope", "attention"), "cross_attn": ("attention", "attention")}
    if reason is None:
        norms = [f"attn.{name}" for name in ("q_norm", "k_norm") if not isinstance(getattr(module.attn, name), nn.Identity)]
        parts |= {name: ("norm", "qk_norm_rope") for name in norms}
        reason = next(filter(None, (swaps.refusal(module.get_submodule(name), "weight") for name in parts)), None)
    if reason is not None:
        parts |= {"norm1": ("norm",), "norm2": ("norm",)}
    elif not swaps.block(where, block, type(module), "norm1", "norm2"):
        reason = swaps.sites[-1].reason
    for name, (op, *served_by) in parts.items():
        at = f"{where}.{name}"
        swaps.leave(op, at, reason, servable=True) if reason else swaps.serve(op, at, *served_by)


def unknown(module: nn.Module) -> str | None:
    """Why a block is not what `block` computes, if so."""
    attn, cross = module.attn, module.cross_attn
    if tuple(signature(type(module).forward).parameters) != ARGUMENTS:
        return "its forward takes other arguments than that of Open-Sora 1.2"
    kinds = type(attn).__name__, type(cross).__name__
    if kinds != ("Attention", "MultiHeadCrossAttention"):
        return f"of {kinds[0]} and {kinds[1]} the adapter knows nothing"
    if other := {type(norm).__name__ for norm in (module.norm1, module.norm2)} - {"LayerNorm"}:
        return f"its norms are of {', '.join(other)}"
    if any(drop.p for part in (attn, cross) for drop in (part.attn_drop, part.proj_drop)):
        return "it drops what attention gives"
    if getattr(attn, "qk_norm_legacy", False) and attn.rope and not isinstance(attn.q_norm, nn.Identity):
        return "it turns queries and keys before their norm"
    return None


def attend(attn: nn.Module, x: Rows, frames: int, temporal: bool, *, swaps: Swaps) -> Tensor:
    """What Attention computes of frames or of sites as entries of a batch, of (batch, frames * sites, channels)."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
    cos = sin = rows = None
    if attn.rope:
        cos, sin = tables(attn.rotary_emb, frames if temporal else q.shape[1] // frames, attn.head_dim, q.device)
        rows = ops.once(places, len(q), frames, q.shape[1] // frames, temporal, q.device)
    q, k = ops.norm_rope(q, k, q_norm=attn.q_norm, k_norm=attn.k_norm, cos=cos, sin=sin, rows=rows, swaps=swaps)
    mask = Temporal(causal=getattr(attn, "is_causal", False)) if temporal else Spatial()
    out = ops.attend(q, k, v, mask=mask, clip=ops.Clip(frames=frames), scale=attn.scale, swaps=swaps)
    return attn.proj(out.flatten(2))


def tables(rotate: Callable[[Tensor], Tensor], length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair of neighbours at each place: what becomes of (1, 0) where a rotation is applied to it."""
    ones = torch.ones(1, 1, length, head_dim // 2, device=device)
    cos, sin = rotate(torch.stack((ones, torch.zeros_like(ones)), dim=-1).flatten(-2))[0, 0].unflatten(-1, (-1, 2)).float().unbind(-1)
    return cos.contiguous(), sin.contiguous()


def places(batch: int, frames: int, sites: int, temporal: bool, device: torch.device) -> Tensor:
    """Of each token, that in its sequence: of its frame along time, else within its frame."""
    each = torch.arange(frames if temporal else sites, dtype=torch.int32, device=device)
    return (each[:, None] if temporal else each).expand(batch, frames, sites).flatten()


def attend_to_text(cross: nn.Module, x: Tensor, text: Tensor, lengths: Sequence[int] | None, *, swaps: Swaps) -> Tensor:
    """What MultiHeadCrossAttention computes. text: (1, tokens of all texts, channels) of these lengths, or (batch, tokens, channels)."""
    batch, tokens = x.shape[:2]
    q = cross.q_linear(x).unflatten(-1, (cross.num_heads, cross.head_dim)).flatten(0, 1)
    k, v = cross.kv_linear(text).unflatten(-1, (2, cross.num_heads, cross.head_dim)).flatten(0, 1).unbind(1)
    layout, kv_layout = (segments(each, x.device) for each in ((tokens,) * batch, tuple(lengths or [text.shape[1]] * batch)))
    out = attention(q, k, v, layout, Full(), kv_layout=kv_layout, implementation=swaps.implementation)
    return cross.proj(out.view(batch, tokens, -1))


@lru_cache(maxsize=4096)
def segments(lengths: tuple[int, ...], device: torch.device) -> VideoLayout:
    """A pack of sequences of these lengths."""
    return VideoLayout.segments(lengths, device=device)


def block(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    mask: Sequence[int] | None = None,
    x_mask: Tensor | None = None,
    t0: Tensor | None = None,
    T: int | None = None,
    S: int | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What STDiT3Block computes. y: the texts, mask: how many tokens each has. t, t0: modulation (batch, 6 * channels), of frames that
    x_mask (batch, frames) has, and of the others.
    """
    if module.training and not isinstance(module.drop_path, nn.Identity):
        return type(module).forward(module, x, y, t, mask, x_mask, t0, T, S)
    frames = T or x.shape[1] // S
    step = t.unflatten(-1, (6, -1))
    if x_mask is not None:
        step = torch.where(x_mask[:, :, None, None], step[:, None], t0.unflatten(-1, (6, -1))[:, None])
    shift, scale, gate, shift2, scale2, gate2 = (module.scale_shift_table + step).unbind(-2)
    x = ops.promoted(x, gate)
    h = ops.modulate(x, module.norm1, shift, scale, fp8=takes(module.attn, module.attn.qkv), swaps=swaps)
    x = ops.gate(x, attend(module.attn, h, frames, module.temporal, swaps=swaps), gate, swaps=swaps)
    h = attend_to_text(module.cross_attn, x, y, mask, swaps=swaps)
    x, h = ops.gate_and_modulate(x, h, None, module.norm2, shift2, scale2, fp8=takes(module.mlp, module.mlp.fc1), swaps=swaps)
    return ops.gate(x, module.mlp(h), gate2, swaps=swaps)


def final_layer(
    module: nn.Module,
    x: Tensor,
    t: Tensor,
    x_mask: Tensor | None = None,
    t0: Tensor | None = None,
    T: int | None = None,
    S: int | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What T2IFinalLayer computes; with an x_mask, where it normalises frames twice, as it stands."""
    if x_mask is not None:
        return type(module).forward(module, x, t, x_mask, t0, T, S)
    shift, scale = (module.scale_shift_table + t[:, None]).unbind(1)
    return ops.project(x, module.linear, module.norm_final, shift, scale, swaps=swaps)
