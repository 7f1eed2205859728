"""UNets whose frames are images and whose temporal transformers join them: AnimateDiff (Guo et al. 2023), ModelScope's and I2VGen-XL's.

What is computed otherwise than in diffusers: temporal transformers leave tokens where they are, (batch, frames * sites, channels), which is
what their group norm reads and writes too, and the norm before an attention adds the positions of frames. Group norms of single frames are
one op with their SiLU.
"""

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel, TransformerTemporalModelOutput
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn
from tubelet.kernels import Temporal, group_norm_silu

from . import generic, ops
from .basic_block import swap_block, take_clips
from .swaps import Swaps

OVER_FRAMES = "the library's: over the frames too, whose pixels do not lie at one distance"
WITHOUT_SILU = "the library's: of images, and its module has no SiLU to do with it"


def swap(swaps: Swaps) -> None:
    """Serve a UNetMotionModel, a UNet3DConditionModel, an I2VGenXLUNet or a TransformerTemporalModel."""
    for where, _ in list(swaps.named(BasicTransformerBlock)):
        swap_block(swaps, where)
    for kind, function in ((AnimateDiffTransformer3D, motion_module), (TransformerTemporalModel, temporal_model)):
        for where, _ in list(swaps.named(kind)):
            inside = f"{where}." if where else ""
            for linear in ("proj_in", "proj_out"):
                swaps.linears(inside + linear)
            swap_group_norms(swaps, where, function, kind, {"sites as entries of a batch": ("attention",)}, "norm")
    for where, resnet in list(swaps.named(ResnetBlock2D)):
        plain = resnet.time_embedding_norm == "default" and resnet.upsample is resnet.downsample is None
        if plain and type(resnet.nonlinearity) is nn.SiLU:
            swap_group_norms(swaps, where, resnet_block, ResnetBlock2D, {"SiLU": ("group_norm_silu",)}, "norm1", "norm2")
    spoken_of = {site.where for site in swaps.sites}
    over_frames = tuple(f"{where}." for where, _ in swaps.named(TemporalConvLayer))
    for where, module in swaps.model.named_modules():
        if isinstance(module, Attention) and where not in spoken_of:
            swaps.processor(where, generic.attend, AttnProcessor2_0)
        if isinstance(module, nn.GroupNorm) and where not in spoken_of:
            swaps.leave("norm", where, OVER_FRAMES if where.startswith(over_frames) else WITHOUT_SILU)


def swap_group_norms(swaps: Swaps, where: str, function: Any, kind: type, sites: dict[str, tuple[str, ...]], *names: str) -> None:
    """Let function be the forward of a module that gives its group norms of these names to `group_norm`."""
    norms = {f"{where}.{name}".removeprefix("."): getattr(swaps.module(where), name) for name in names}
    reason = next(filter(None, (swaps.refusal(norm, "weight", "bias") for norm in norms.values())), None)
    for name, norm in norms.items():
        reason = reason or (None if type(norm) is nn.GroupNorm else f"{name} is a {type(norm).__name__}")
    if reason:
        for op in sites:
            swaps.leave(op, where, reason, servable=True)
    elif swaps.forward(where, function, sites, kind=kind):
        for name in norms:
            swaps.serve("norm", name, "group_norm_silu")


def group_norm(x: Tensor, norm: nn.GroupNorm, silu: bool, *, swaps: Swaps) -> Tensor:
    """A group norm of images (batch, channels, height, width), with a SiLU."""
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, eps=norm.eps, silu=silu, implementation=swaps.implementation)


def along_time(module: nn.Module, images: Tensor, frames: int, *, swaps: Swaps, **how: Any) -> Tensor:
    """images (batch * frames, channels, height, width) after a temporal transformer."""
    _, _, height, width = images.shape
    x = images.unflatten(0, (-1, frames)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    long = x.transpose(1, 2).unflatten(2, (frames * height, width))  # all frames are one image to the norm
    x = group_norm(long, module.norm, False, swaps=swaps).flatten(2).transpose(1, 2)
    x = module.proj_in(x)
    for block in module.transformer_blocks:
        x = block(x, (Temporal(causal=False), ops.Clip(frames=frames)), **how)
    x = module.proj_out(x).unflatten(1, (frames, height, width)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    return images + x


def motion_module(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    num_frames: int = 1,
    cross_attention_kwargs: dict[str, Any] | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What AnimateDiffTransformer3D computes."""
    how = {"timestep": timestep, "class_labels": class_labels, "cross_attention_kwargs": cross_attention_kwargs}
    if encoder_hidden_states is not None or not take_clips(module.transformer_blocks):  # a text for each site, or others' blocks
        return type(module).forward(module, hidden_states, encoder_hidden_states, num_frames=num_frames, **how)
    return along_time(module, hidden_states, num_frames, swaps=swaps, **how)


def temporal_model(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    num_frames: int = 1,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> TransformerTemporalModelOutput | tuple[Tensor]:
    """What TransformerTemporalModel computes."""
    how = {"timestep": timestep, "class_labels": class_labels, "cross_attention_kwargs": cross_attention_kwargs}
    if encoder_hidden_states is not None or not take_clips(module.transformer_blocks):
        how |= {"num_frames": num_frames, "return_dict": return_dict}
        return type(module).forward(module, hidden_states, encoder_hidden_states, **how)
    x = along_time(module, hidden_states, num_frames, swaps=swaps, **how)
    return TransformerTemporalModelOutput(sample=x) if return_dict else (x,)


def resnet_block(module: nn.Module, input_tensor: Tensor, temb: Tensor | None, *args, swaps: Swaps, **kwargs) -> Tensor:
    """What ResnetBlock2D computes, of one size, where the time's embedding is added."""
    x = module.conv1(group_norm(input_tensor, module.norm1, True, swaps=swaps))
    if module.time_emb_proj is not None:
        temb = module.time_emb_proj(temb if module.skip_time_act else module.nonlinearity(temb))[:, :, None, None]
    if temb is not None:
        x = x + temb
    x = module.conv2(module.dropout(group_norm(x, module.norm2, True, swaps=swaps)))
    residual = input_tensor
    if module.conv_shortcut is not None:
        residual = module.conv_shortcut(residual.contiguous() if module.training else residual)
    return residual + x if module.output_scale_factor == 1 else (residual + x) / module.output_scale_factor
