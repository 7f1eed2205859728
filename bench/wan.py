"""The transformer of Wan 2.1 (WanTransformer3DModel of diffusers), with its parameters named as there, run in two ways: dense, a batch of
clips of one size, in plain torch; and packed, clips of any sizes, with this project's ops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tubelet.engine.dit import waves
from tubelet.engine.precision import FP8Linear
from tubelet.kernels import (
    Full,
    Modulation,
    VideoLayout,
    attention,
    gated_residual,
    gelu_quantize_rows,
    modulated_norm,
    patch_embed,
    qk_norm_rope,
    rotary_table,
)

PATCH = (1, 2, 2)
EPS = 1e-6


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the transformer."""

    heads: int = 12
    head_dim: int = 128
    mlp: int = 8960
    layers: int = 30
    channels: int = 16
    text_width: int = 4096

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class Packed(NamedTuple):
    """What the blocks read of a pack: where clips and texts lie, the row of each token, and its rotary tables."""

    layout: VideoLayout
    text_layout: VideoLayout
    rows: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, grids: Sequence[tuple[int, int, int]], text: Sequence[int], head_dim: int, device: torch.device) -> "Packed":
        layout = VideoLayout.pack(grids, device=device)
        sides = 2 * (head_dim // 6)
        cos, sin = rotary_table(layout.positions, (head_dim - 2 * sides, sides, sides))
        return cls(layout, VideoLayout.segments(text, device=device), layout.rows("clip"), cos, sin)


class Attention(nn.Module):
    """The parameters of an attention."""

    def __init__(self, width: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = (nn.RMSNorm(width, EPS) for _ in range(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, hidden)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class WanBlock(nn.Module):
    """Self-attention, attention to the text, MLP."""

    def __init__(self, config: WanConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attn1, self.attn2 = Attention(width), Attention(width)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.ffn = FeedForward(width, config.mlp)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    @torch.no_grad()
    def fuse(self) -> None:
        """One product for q, k and v, and one for the k and v of the text, beside the parameters that stay as they are: what is timed."""
        one, two, mlp = self.attn1, self.attn2, self.ffn.net
        self.qkv, self.kv = _joined(one.to_q, one.to_k, one.to_v), _joined(two.to_k, two.to_v)
        self.products = {
            "qkv": self.qkv, "out": one.to_out[0], "q": two.to_q, "kv": self.kv, "text out": two.to_out[0], "mlp in": mlp[0].proj,
            "mlp out": mlp[2],
        }  # fmt: skip

    def to_fp8(self) -> None:
        """The same in E4M3: for `packed` with fp8."""
        self.products8 = {name: FP8Linear(each) for name, each in self.products.items()}

    def packed(self, x: Tensor, text: Tensor, condition: Tensor, pack: Packed, fp8: bool = False) -> Tensor:
        """x (tokens, width), text (text tokens, width), condition (clips, 6, width). fp8: products in E4M3, what goes into them quantised
        by what is before them.
        """
        shift, scale, gate, shift2, scale2, gate2 = (self.scale_shift_table + condition).unbind(1)
        rows, one, two, products = pack.rows, self.attn1, self.attn2, self.products8 if fp8 else self.products
        h = modulated_norm(x, shift, scale, rows, eps=EPS, fp8=fp8)
        q, k, v = products["qkv"](h).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k = qk_norm_rope(q, k, one.norm_q.weight, one.norm_k.weight, pack.cos, pack.sin, across_heads=True, eps=EPS)
        y = products["out"](attention(q, k, v, pack.layout, Full()).flatten(1))
        norm2 = Modulation(None, None, "layer", self.norm2.weight, self.norm2.bias, EPS)
        x, h = gated_residual(x, y, gate, rows, norm=norm2, fp8=fp8)
        q = modulated_norm(products["q"](h), kind="rms", weight=two.norm_q.weight, eps=EPS)
        k, v = products["kv"](text).chunk(2, dim=-1)
        k = modulated_norm(k.contiguous(), kind="rms", weight=two.norm_k.weight, eps=EPS)
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in (q, k, v))
        y = products["text out"](attention(q, k, v, pack.layout, Full(), kv_layout=pack.text_layout).flatten(1))
        x, h = gated_residual(x, y, rows=rows, norm=Modulation(shift2, scale2, eps=EPS), fp8=fp8)
        h = products["mlp in"](h)
        h = gelu_quantize_rows(h, "tanh") if fp8 else F.gelu(h, approximate="tanh")
        return gated_residual(x, products["mlp out"](h), gate2, rows)

    def dense(self, x: Tensor, text: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor | None = None) -> Tensor:
        """x (batch, tokens, width), text (batch, words, width), condition (batch, 6, width), cos and sin (tokens, pairs) or with a batch;
        hidden: the keys that nobody may see, bool (batch, tokens), for clips that were padded.
        """
        shift, scale, gate, shift2, scale2, gate2 = (self.scale_shift_table + condition)[:, :, None].unbind(1)
        one, two, width = self.attn1, self.attn2, x.shape[-1:]
        h = F.layer_norm(x, width, eps=EPS) * (1 + scale) + shift
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (one.norm_q(q), one.norm_k(k), v))
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        seen = None if hidden is None else ~hidden[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        x = x + one.to_out[0](y) * gate
        h = self.norm2(x)
        k, v = self.kv(text).chunk(2, dim=-1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (two.norm_q(two.to_q(h)), two.norm_k(k), v))
        x = x + two.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, width, eps=EPS) * (1 + scale2) + shift2
        return x + self.ffn(h) * gate2


def _joined(*linears: nn.Linear) -> nn.Linear:
    """One that gives what they give, side by side."""
    one = nn.Linear(linears[0].in_features, sum(each.out_features for each in linears), device="meta")
    for name in ("weight", "bias"):
        setattr(one, name, nn.Parameter(torch.cat([getattr(each, name) for each in linears]), requires_grad=False))
    return one


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, tokens, head_dim), pairs of neighbours turned."""
    cos, sin = (each if each.dim() == 2 else each[:, None] for each in (cos, sin))
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).to(x.dtype)


class ConditionEmbedder(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        width = config.width
        self.time_embedder, self.text_embedder = nn.Module(), nn.Module()
        self.time_embedder.linear_1, self.time_embedder.linear_2 = nn.Linear(256, width), nn.Linear(width, width)
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder.linear_1, self.text_embedder.linear_2 = nn.Linear(config.text_width, width), nn.Linear(width, width)
        for module in self.modules():  # to numbers about one, as of a trained model: gates near zero would hide what is wrong behind them
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.6 * module.in_features**-0.5)

    def forward(self, times: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(time, (clips, width); what modulates the blocks, (clips, 6, width); text)."""
        time, words = self.time_embedder, self.text_embedder
        embedded = time.linear_2(F.silu(time.linear_1(waves(times, 256).to(text.dtype))))
        text = words.linear_2(F.gelu(words.linear_1(text), approximate="tanh"))
        return embedded, self.time_proj(F.silu(embedded)).unflatten(-1, (6, -1)), text


class WanModel(nn.Module):
    """The whole transformer: one evaluation is a step of sampling without guidance."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.channels, config.width, PATCH, PATCH)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.layers))
        self.proj_out = nn.Linear(config.width, config.channels * 4)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.width) / config.width**0.5)

    def fuse(self, fp8: bool = False) -> None:
        """Before anything is run; and for `packed` with fp8."""
        for block in self.blocks:
            block.fuse()
            if fp8:
                block.to_fp8()

    def packed(self, clips: Sequence[Tensor], times: Tensor, text: Tensor, pack: Packed, fp8: bool = False) -> list[Tensor]:
        """clips (channels, T, H, W) of any sizes, times (clips,), text (words of all clips, text_width); what the model says of each
        clip.
        """
        x = patch_embed(clips, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias, patch=PATCH)
        time, condition, text = self.condition_embedder(times, text)
        for block in self.blocks:
            x = block.packed(x, text, condition, pack, fp8)
        shift, scale = (self.scale_shift_table + time[:, None]).unbind(1)
        x = self.proj_out(modulated_norm(x, shift, scale, pack.rows, eps=EPS))
        return [_video(x[span.video_start : span.video_stop], span.grid) for span in pack.layout.clips]

    def dense(self, clips: Tensor, times: Tensor, text: Tensor, cos: Tensor, sin: Tensor, run: Callable | None = None) -> Tensor:
        """clips (batch, channels, T, H, W), times (batch,), text (batch, words, text_width). run: instead of `WanBlock.dense`."""
        x = self.patch_embedding(clips)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).contiguous()
        time, condition, text = self.condition_embedder(times, text)
        for block in self.blocks:
            x = block.dense(x, text, condition, cos, sin) if run is None else run(block, x, text, condition, cos, sin)
        shift, scale = (self.scale_shift_table + time[:, None])[:, :, None].unbind(1)
        x = self.proj_out(F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift)
        return torch.stack([_video(each, grid) for each in x])

    def weight_bytes(self, blocks: bool, fp8: bool) -> int:
        """Of what an evaluation reads at least, or its blocks."""
        each = [x for block in self.blocks for x in block.products.values()]
        wide = [self.patch_embedding, self.condition_embedder, self.proj_out]
        found = sum(x.weight.numel() * (1 if fp8 else x.weight.element_size()) for x in each)
        return found if blocks else found + sum(x.numel() * x.element_size() for module in wide for x in module.parameters())

    def in_diffusers(self) -> nn.Module:
        """diffusers' own transformer with these parameters, its projections fused as well."""
        from importlib import import_module

        config, parameter = self.config, next(self.parameters())
        kind = import_module("diffusers").WanTransformer3DModel
        sizes = PATCH, config.heads, config.head_dim, config.channels, config.channels, config.text_width, 256, config.mlp, config.layers
        with parameter.device:  # on the host, numbers for its parameters would take longer than all that is measured
            model = kind(*sizes, eps=EPS)
        model = model.to(parameter.device, parameter.dtype).eval()
        model.load_state_dict({name: x for name, x in self.state_dict().items() if not {"qkv", "kv"} & set(name.split("."))}, strict=True)
        model.fuse_qkv_projections()
        return model


def _video(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens (T * H * W, 4 * channels), channels fastest, as (channels, T, 2 H, 2 W)."""
    x = tokens.unflatten(0, tuple(grid)).unflatten(-1, (*PATCH, -1))
    return x.permute(6, 0, 3, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def flops(config: WanConfig, grids: Sequence[tuple[int, int, int]], text: Sequence[int]) -> float:
    """Of one evaluation of the blocks."""
    width, total = config.width, 0.0
    for (t, h, w), words in zip(grids, text, strict=True):
        n = t * h * w
        total += 2 * n * width * (6 * width + 2 * config.mlp) + 4 * words * width * width  # q, k, v, out, q, out; MLP; k, v of the text
        total += 4 * width * n * (n + words)
    return config.layers * total
