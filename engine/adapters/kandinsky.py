"""Kandinsky 5 (Kandinsky Lab 2025).

What is computed otherwise than in diffusers: rotary positions, a matrix of 2 x 2 for each pair there, are a cosine and a sine; hidden
states are never copied to float32, nor patches at all. Queries and keys that are turned are rounded to bfloat16 in any precision, as there.
"""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_kandinsky as kandinsky
from torch import Tensor, nn
from tubelet.kernels import gelu_quantize_rows, patch_embed

from . import ops
from .cosmos import swap_patches
from .fp8 import Rows, serves, takes
from .swaps import Swaps, takes_fp8

SPARSE = "with `sparse_params` each layer chooses its blocks of pairs by their scores (NABLA), which is flex attention's"


def swap(swaps: Swaps) -> None:
    """Serve a Kandinsky5Transformer3DModel."""
    swap_patches(swaps, "visual_embeddings", "in_layer", embed, kandinsky.Kandinsky5VisualEmbeddings)
    sparse = swaps.model.config.attention_type == "nabla"
    for where, _ in list(swaps.named(kandinsky.Kandinsky5Attention)):
        norms = ("query_norm", "key_norm")
        swaps.processor(where, attend, kandinsky.Kandinsky5AttnProcessor, "qk_norm_rope", "attention", norms=norms, takes_backend=sparse)
    for where, _ in list(swaps.named(kandinsky.Kandinsky5TransformerDecoderBlock)):
        if sparse:
            swaps.leave("sparse attention", f"{where}.self_attention", SPARSE)
        swaps.linears(where, "visual_modulation")
        if swaps.precision == "fp8":
            swaps.forward(f"{where}.feed_forward", feed_forward, {"GELU": ("gelu_quantize_rows",)}, kind=kandinsky.Kandinsky5FeedForward)
    for kind, function in (
        (kandinsky.Kandinsky5TransformerEncoderBlock, text_block),
        (kandinsky.Kandinsky5TransformerDecoderBlock, visual_block),
    ):
        for where, module in list(swaps.named(kind)):
            swaps.block(where, function, kind, *(name for name, child in module.named_children() if isinstance(child, nn.LayerNorm)))
    if swaps.forward("out_layer", finish, {"modulation": ("final_layer",)}, kind=kandinsky.Kandinsky5OutLayer):
        swaps.last_layer("out_layer.norm", "out_layer.out_layer")


def attend(
    attn: nn.Module,
    hidden_states: Rows,
    encoder_hidden_states: Tensor | None = None,
    rotary_emb: Tensor | None = None,
    sparse_params: dict | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What Kandinsky5AttnProcessor computes."""
    cross = encoder_hidden_states is not None
    text = encoder_hidden_states if cross else hidden_states
    projections = (attn.to_query, hidden_states), (attn.to_key, text), (attn.to_value, text)
    q, k, v = (to(x).unflatten(-1, (attn.num_heads, -1)) for to, x in projections)
    cos, sin = (None, None) if rotary_emb is None else tables(rotary_emb, rotary_emb)
    q, k = ops.norm_rope(q, k, q_norm=attn.query_norm, k_norm=attn.key_norm, cos=cos, sin=sin, swaps=swaps)
    if rotary_emb is not None and q.dtype != torch.bfloat16:
        q, k = (x.to(torch.bfloat16).type_as(x) for x in (q, k))
    if sparse_params is None:
        out = ops.attend(q, k, v, cross=cross, swaps=swaps)
    else:
        mask = kandinsky.nablaT_v2(q, k, sparse_params["sta_mask"], thr=sparse_params["P"])
        backend = attn.processor._attention_backend or attn.processor.own._attention_backend
        out = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)
    return attn.out_layer(out.flatten(2))


@ops.half_tables
def tables(rotary: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 (tokens, pairs), of the model's matrices (batch or 1, tokens, 1, pairs, 2, 2), which are those of one
    entry for all; of (1, batch, tokens, 1, pairs, 2, 2) those of each.
    """
    return tuple(rotary[0, ..., 0, :, row, 0].float().contiguous() for row in (0, 1))


def modulation(module: nn.Module, time_embed: Tensor, batch: int, parts: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates of a step, (batch, channels) each."""
    return module(time_embed).expand(batch, -1).chunk(parts, dim=-1)


def text_block(module: nn.Module, x: Tensor, time_embed: Tensor, rope: Tensor, *, swaps: Swaps) -> Tensor:
    """What Kandinsky5TransformerEncoderBlock computes."""
    shift, scale, gate, shift2, scale2, gate2 = modulation(module.text_modulation, time_embed, len(x), 6)
    y = module.self_attention(ops.modulate(x, module.self_attention_norm, shift, scale, swaps=swaps), rotary_emb=rope)
    x, h = ops.gate_and_modulate(x, y, gate, module.feed_forward_norm, shift2, scale2, swaps=swaps)
    return ops.gate(x, module.feed_forward(h), gate2, swaps=swaps)


def visual_block(
    module: nn.Module,
    visual_embed: Tensor,
    text_embed: Tensor,
    time_embed: Tensor,
    rope: Tensor,
    sparse_params: dict | None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What Kandinsky5TransformerDecoderBlock computes."""
    x, attn, cross = visual_embed, module.self_attention, module.cross_attention
    parts = modulation(module.visual_modulation, time_embed, len(x), 9)
    (shift, scale, gate), (shift2, scale2, gate2), (shift3, scale3, gate3) = parts[:3], parts[3:6], parts[6:]
    fp8 = takes_fp8(attn, attn.to_query, attn.to_key, attn.to_value)
    h = ops.modulate(x, module.self_attention_norm, shift, scale, fp8=fp8, swaps=swaps)
    y = attn(h, rotary_emb=rope, sparse_params=sparse_params)
    fp8 = takes_fp8(cross, cross.to_query)
    x, h = ops.gate_and_modulate(x, y, gate, module.cross_attention_norm, shift2, scale2, fp8=fp8, swaps=swaps)
    y = cross(h, encoder_hidden_states=text_embed)
    fp8 = takes(module.feed_forward, module.feed_forward.in_layer)
    x, h = ops.gate_and_modulate(x, y, gate2, module.feed_forward_norm, shift3, scale3, fp8=fp8, swaps=swaps)
    return ops.gate(x, module.feed_forward(h), gate3, swaps=swaps)


def feed_forward(module: nn.Module, x: Rows, *, swaps: Swaps) -> Tensor:
    """What Kandinsky5FeedForward computes; where both of its products are in E4M3, what lies between them is one op."""
    x, gelu = module.in_layer(x), module.activation
    if serves(module.out_layer):
        return module.out_layer(gelu_quantize_rows(x, gelu.approximate, implementation=swaps.implementation))
    return module.out_layer(gelu(x))


def embed(module: nn.Module, x: Tensor, *, swaps: Swaps) -> Tensor:
    """What Kandinsky5VisualEmbeddings computes: the tokens of clips (batch, T, H, W, channels), as (batch, t, h, w, dim)."""
    linear, (pt, ph, pw) = module.in_layer, module.patch_size
    if type(linear) is not nn.Linear or swaps.refusal(linear, "weight", "bias"):
        return type(module).forward(module, x)
    batch, *sides, channels = x.shape
    clips = x.flatten(3)[:, None].unbind(0)  # of one channel, whose rows hold the channels of each pixel, as those of the weight do
    patch, how = (pt, ph, pw * channels), {"implementation": swaps.implementation}
    tokens = patch_embed(clips, linear.weight, linear.bias, patch=patch, **how)
    return tokens.view(batch, sides[0] // pt, sides[1] // ph, sides[2] // pw, -1)


def finish(module: nn.Module, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, *, swaps: Swaps) -> Tensor:
    """What Kandinsky5OutLayer computes."""
    grid = visual_embed.shape[1:4]
    shift, scale = modulation(module.modulation, time_embed, len(visual_embed), 2)
    x = ops.project(visual_embed.flatten(1, 3), module.out_layer, module.norm, shift, scale, swaps=swaps)
    x = x.unflatten(2, (-1, *module.patch_size)).unflatten(1, grid).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)
