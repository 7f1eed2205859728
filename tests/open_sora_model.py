"""STDiT3 of Open-Sora, as its equations and names of parameters are: that repository is no package that a test could install."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """RMS norm, with its constant named as there."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


class Rotary(nn.Module):
    """Pairs of neighbours turned by their place, the second to last axis."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.register_buffer("freqs", 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim))

    def rotate_queries_or_keys(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * self.freqs
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles.float()), angles.float()
        )
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, rope=None, qk_norm: bool = True, legacy: bool = False):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width // heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (Norm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.rope, self.qk_norm_legacy, self.is_causal = rope is not None, legacy, False
        if rope is not None:
            self.rotary_emb = rope

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        steps = [(self.q_norm, self.k_norm), (self.rotary_emb,) * 2] if self.rope else [(self.q_norm, self.k_norm)]
        for of_q, of_k in reversed(steps) if self.qk_norm_legacy else steps:
            q, k = of_q(q), of_k(k)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class MultiHeadCrossAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, cond: Tensor, mask: list[int] | None = None) -> Tensor:
        """cond: (1, tokens of all texts, channels), mask: how many each has."""
        k, v = self.kv_linear(cond).flatten(0, 1).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        outs = []
        for q, *text in zip(self.q_linear(x).unflatten(-1, (self.num_heads, -1)), k.split(mask), v.split(mask), strict=True):
            outs.append(F.scaled_dot_product_attention(*(each.transpose(0, 1)[None] for each in (q, *text)))[0].transpose(0, 1))
        return self.proj(torch.stack(outs).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class STDiT3Block(nn.Module):
    def __init__(self, width: int, heads: int, temporal: bool, **attention):
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = (nn.LayerNorm(width, 1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.cross_attn = Attention(width, heads, **attention), MultiHeadCrossAttention(width, heads)
        self.mlp, self.drop_path = Mlp(width, 4 * width, width), nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):
        steps = [self.scale_shift_table + each.unflatten(-1, (6, -1)) for each in (t, t if t0 is None else t0)]
        known = torch.ones(len(x), T, dtype=torch.bool, device=x.device) if x_mask is None else x_mask
        step = torch.where(known[:, :, None, None, None], steps[0][:, None, None], steps[1][:, None, None])
        shift, scale, gate, shift2, scale2, gate2 = step.unbind(3)
        x = x.unflatten(1, (T, S))
        h = self.norm1(x) * (1 + scale) + shift
        if self.temporal:
            h = self.attn(h.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), S)).transpose(1, 2)
        else:
            h = self.attn(h.flatten(0, 1)).unflatten(0, (len(x), T))
        x = x + gate * h
        x = x + self.cross_attn(x.flatten(1, 2), y, mask).unflatten(1, (T, S))
        return (x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)).flatten(1, 2)


class PatchEmbed3D(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv3d(channels, width, (1, 2, 2), (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class T2IFinalLayer(nn.Module):
    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(width, 1e-6, elementwise_affine=False), nn.Linear(width, channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x, t, x_mask=None, t0=None, T=None, S=None):
        def modulated(x: Tensor, t: Tensor) -> Tensor:
            shift, scale = (self.scale_shift_table + t[:, None]).unbind(1)
            return self.norm_final(x) * (1 + scale[:, None]) + shift[:, None]

        x = modulated(x, t)
        if x_mask is not None:  # of what is normalised already: as there
            x = torch.where(x_mask.repeat_interleave(S, dim=1)[..., None], x, modulated(x, t0))
        return self.linear(x)


class STDiT3(nn.Module):
    """channels, T, H, W to channels, T, H, W; texts padded to one length."""

    def __init__(self, width: int = 32, heads: int = 2, depth: int = 2, channels: int = 4, text: int = 16, **attention):
        super().__init__()
        self.rope, self.width, self.channels = Rotary(width // heads), width, channels
        self.x_embedder, self.y_embedder = PatchEmbed3D(channels, width), Mlp(text, width, width)
        self.t_embedder = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.spatial_blocks = nn.ModuleList(STDiT3Block(width, heads, False, **attention) for _ in range(depth))
        turn = self.rope.rotate_queries_or_keys
        self.temporal_blocks = nn.ModuleList(STDiT3Block(width, heads, True, rope=turn, **attention) for _ in range(depth))
        self.final_layer = T2IFinalLayer(width, 4 * channels)

    def step(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        angles = timestep[:, None] * 10000.0 ** -(torch.arange(8, device=timestep.device) / 8)
        t = self.t_embedder(torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.t_embedder[0].weight.dtype))
        return t, self.t_block(t)

    def forward(self, x, timestep, y, mask=None, x_mask=None, return_dict=True):
        (batch, _, frames, *sides), sites = x.shape, math.prod(x.shape[3:]) // 4
        (t, t_mlp), (t0, t0_mlp) = self.step(timestep), (None, None) if x_mask is None else self.step(torch.zeros_like(timestep))
        mask = torch.ones(y.shape[:2], dtype=torch.bool) if mask is None else mask
        text, lengths = self.y_embedder(y)[mask][None], mask.sum(dim=1).tolist()
        x = self.x_embedder(x)
        for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block in pair:
                x = block(x, text, t_mlp, lengths, x_mask, t0_mlp, frames, sites)
        x = self.final_layer(x, t, x_mask, t0, frames, sites).unflatten(1, (frames, sides[0] // 2, sides[1] // 2))
        return (x.unflatten(-1, (2, 2, self.channels)).permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, self.channels, frames, *sides),)


STDiT3.__module__ = "opensora.models.stdit.stdit3"
