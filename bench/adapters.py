"""Cases of other people's video transformers: one denoising step of diffusers' models with random weights, untouched and with tubelet's
kernels (`tubelet.engine.adapters.accelerate`), each also compiled.

All implementations share the weights of one model. On a GPU in bfloat16, at the models' real sizes; on a CPU small ones. Results are
compared with those of the untouched model in the same precision.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .harness import DEFAULT, FULL, QUICK, Case, Implementation, Problem, Tolerance, Unsupported, storage_bytes

OP = "adapters"
Size = tuple[int, int, int]
Draw = Callable[..., Tensor]
TOLERANCES = {torch.float32: Tolerance(1e-4, 1e-3), torch.bfloat16: Tolerance(5e-2, 3e-1)}
"""Of the untouched model: of bfloat16, what its own roundings in other places come to over all layers."""
FP8_TOLERANCE = Tolerance(1.5e-1, 5e-1)


@dataclass(frozen=True)
class Family:
    """A class of diffusers, at the size of a published model and at one for a CPU.

    config, small: of the class. size, small_size: of the latents (T, H, W). call: from a function that draws numbers of a shape, that size,
    a number of words and the model, to the arguments of a step. level: of the benchmark, on a GPU and on a CPU.
    """

    kind: str
    config: dict[str, Any]
    small: dict[str, Any]
    size: Size
    small_size: Size
    call: Callable[[Draw, Size, int, Any], dict[str, Any]]
    words: int = 512
    levels: tuple[int, int] = (FULL, FULL)


def _text(draw: Draw, words: int, width: int) -> Tensor:
    return draw(1, words, width)


def _mask(draw: Draw, words: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Of a text of two thirds of its room."""
    device = draw(1).device
    return (torch.arange(words, device=device) < 2 * words // 3)[None].to(dtype)


def _step(draw: Draw, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full((1,), 500, device=draw(1).device, dtype=dtype or draw(1).dtype)


def wan(draw, size, words, config):
    text = _text(draw, words, config.text_dim)
    return {"hidden_states": draw(1, config.in_channels, *size), "timestep": _step(draw), "encoder_hidden_states": text}


def wan_first_frame(draw, size, words, config):
    """A timestep for each token, zero in the first frame."""
    tokens = size[0] * (size[1] // 2) * (size[2] // 2)
    steps = _step(draw).repeat(tokens)
    steps[: tokens // size[0]] = 0
    return wan(draw, size, words, config) | {"timestep": steps[None]}


def skyreels(draw, size, words, config):
    """Diffusion forcing: a timestep for each frame."""
    steps = torch.linspace(0, 900, size[0], device=draw(1).device)[None].to(torch.int64)
    return wan(draw, size, words, config) | {"timestep": steps, "enable_diffusion_forcing": True}


def hunyuan(draw, size, words, config):
    return {
        "hidden_states": draw(1, config.in_channels, *size),
        "timestep": _step(draw),
        "encoder_hidden_states": _text(draw, words, config.text_embed_dim),
        "encoder_attention_mask": _mask(draw, words),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "guidance": _step(draw),
    }


def hunyuan15(draw, size, words, config):
    return {
        "hidden_states": draw(1, config.in_channels, *size),
        "timestep": _step(draw),
        "encoder_hidden_states": _text(draw, words, config.text_embed_dim),
        "encoder_attention_mask": _mask(draw, words),
        "encoder_hidden_states_2": _text(draw, 64, config.text_embed_2_dim),
        "encoder_attention_mask_2": _mask(draw, 64),
        "image_embeds": torch.zeros_like(draw(1, 9, config.image_embed_dim)),
    }


def ltx(draw, size, words, config):
    frames, height, width = size
    return {
        "hidden_states": draw(1, frames * height * width, config.in_channels),
        "encoder_hidden_states": _text(draw, words, config.caption_channels),
        "timestep": _step(draw)[:, None],
        "encoder_attention_mask": _mask(draw, words),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def ltx2(draw, size, words, config):
    """With five seconds of sound to 121 frames."""
    sound = 6 * size[0]
    return ltx(draw, size, words, config) | {
        "audio_hidden_states": draw(1, sound, config.audio_in_channels),
        "audio_encoder_hidden_states": _text(draw, words, config.caption_channels),
        "audio_encoder_attention_mask": _mask(draw, words),
        "audio_num_frames": sound,
    }


def cogvideox(draw, size, words, config):
    frames, height, width = size
    tokens, pairs = frames * (height // 2) * (width // 2), config.attention_head_dim // 2
    angles = draw(tokens, pairs).float().repeat_interleave(2, dim=1)
    return {
        "hidden_states": draw(1, frames, config.in_channels, height, width),
        "encoder_hidden_states": _text(draw, words, config.text_embed_dim),
        "timestep": _step(draw, torch.int64),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def consisid(draw, size, words, config):
    """With what two networks saw of a face."""
    features = [draw(1, 577, config.LFE_vit_dim) for _ in range(config.LFE_num_scale)]
    return cogvideox(draw, size, words, config) | {"id_cond": draw(1, config.LFE_id_dim), "id_vit_hidden": features}


def mochi(draw, size, words, config):
    return {
        "hidden_states": draw(1, config.in_channels, *size),
        "encoder_hidden_states": _text(draw, words, config.text_embed_dim),
        "timestep": _step(draw),
        "encoder_attention_mask": _mask(draw, words),
    }


def latte(draw, size, words, config):
    return {
        "hidden_states": draw(1, config.in_channels, *size),
        "timestep": _step(draw, torch.int64),
        "encoder_hidden_states": _text(draw, words, config.caption_channels),
    }


def allegro(draw, size, words, config):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = size[0], size[1] // 2, size[2] // 2
    axes = get_3d_rotary_pos_embed_allegro(
        embed_dim=config.attention_head_dim,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
        interpolation_scale=(2.2, 2.0, 2.0),
        device=draw(1).device,
    )
    places = torch.cartesian_prod(*(grid.long() for grid in axes[3:]))
    return {
        "hidden_states": draw(1, config.in_channels, *size),
        "encoder_hidden_states": _text(draw, words, config.caption_channels),
        "timestep": _step(draw, torch.int64),
        "attention_mask": torch.ones(1, *size, device=draw(1).device, dtype=draw(1).dtype),
        "encoder_attention_mask": _mask(draw, words, draw(1).dtype),
        "image_rotary_emb": (axes[:3], tuple(places.T.reshape(3, 1, -1).contiguous())),
    }


def cosmos(draw, size, words, config):
    return {
        "hidden_states": draw(1, config.in_channels, *size),
        "timestep": _step(draw),
        "encoder_hidden_states": _text(draw, words, config.text_embed_dim),
        "fps": 24,
    }


def kandinsky(draw, size, words, config):
    frames, height, width = size
    device = draw(1).device
    return {
        "hidden_states": draw(1, *size, config.in_visual_dim),
        "encoder_hidden_states": _text(draw, words, config.in_text_dim),
        "timestep": _step(draw),
        "pooled_projections": draw(1, config.in_text_dim2),
        "visual_rope_pos": [torch.arange(n, device=device) for n in (frames, height // 2, width // 2)],
        "text_rope_pos": torch.arange(words, device=device),
    }


def sana_video(draw, size, words, config):
    return {
        "hidden_states": draw(1, config.in_channels, *size),
        "encoder_hidden_states": _text(draw, words, config.caption_channels),
        "timestep": _step(draw),
        "encoder_attention_mask": _mask(draw, words, torch.int64),
    }


def animatediff(draw, size, words, config):
    """With a text for each frame, as its pipelines give it."""
    return {
        "sample": draw(1, config.in_channels, *size),
        "timestep": _step(draw, torch.int64),
        "encoder_hidden_states": draw(size[0], words, config.cross_attention_dim),
    }


def easyanimate(draw, size, words, config):
    return {
        "hidden_states": draw(1, config.in_channels, *size),
        "timestep": _step(draw),
        "encoder_hidden_states": _text(draw, words, config.text_embed_dim),
    }


def _sizes(heads: int, head_dim: int, layers: int, **more) -> dict[str, Any]:
    return {"num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers} | more


SMALL_WAN = _sizes(4, 64, 4, ffn_dim=1024, text_dim=256)
SMALL_SIZE = (8, 16, 32)
FAMILIES = {
    "Wan 2.1 1.3B 480p": Family(
        "WanTransformer3DModel", _sizes(12, 128, 30, ffn_dim=8960), SMALL_WAN, (21, 60, 104), SMALL_SIZE, wan, levels=(DEFAULT, QUICK)
    ),
    "Wan 2.2 TI2V-5B 704p": Family(
        "WanTransformer3DModel",
        _sizes(24, 128, 30, ffn_dim=14_336, in_channels=48, out_channels=48),
        SMALL_WAN,
        (31, 44, 80),
        SMALL_SIZE,
        wan_first_frame,
        levels=(FULL, DEFAULT),
    ),
    "SkyReels-V2 DF 1.3B 540p": Family(
        "SkyReelsV2Transformer3DModel",
        _sizes(12, 128, 30, ffn_dim=8960, num_frame_per_block=5),
        SMALL_WAN | {"num_frame_per_block": 2},
        (25, 68, 120),
        SMALL_SIZE,
        skyreels,
        levels=(FULL, DEFAULT),
    ),
    "Helios 14B": Family(
        "HeliosTransformer3DModel",
        _sizes(40, 128, 40, ffn_dim=13_824),
        SMALL_WAN | {"rope_dim": (24, 20, 20)},
        (9, 48, 80),
        SMALL_SIZE,
        wan,
    ),
    "HunyuanVideo 13B 544p": Family(
        "HunyuanVideoTransformer3DModel",
        {},
        _sizes(
            4, 32, 2, num_single_layers=4, num_refiner_layers=1, text_embed_dim=128, pooled_projection_dim=64, rope_axes_dim=(8, 12, 12)
        ),
        (33, 68, 120),
        SMALL_SIZE,
        hunyuan,
        words=256,
        levels=(FULL, DEFAULT),
    ),
    "HunyuanVideo-1.5 8B 480p": Family(
        "HunyuanVideo15Transformer3DModel",
        {},
        _sizes(4, 32, 4, num_refiner_layers=1, text_embed_dim=128, text_embed_2_dim=64, image_embed_dim=64, rope_axes_dim=(8, 12, 12)),
        (31, 30, 53),
        (8, 8, 16),
        hunyuan15,
        words=256,
    ),
    "LTX-Video 2B 704p": Family(
        "LTXVideoTransformer3DModel",
        {},
        _sizes(4, 64, 4, cross_attention_dim=256, caption_channels=128, in_channels=32, out_channels=32),
        (21, 16, 22),
        (8, 8, 16),
        ltx,
        words=128,
        levels=(FULL, DEFAULT),
    ),
    "LTX-2 19B 704p": Family(
        "LTX2VideoTransformer3DModel",
        {},
        _sizes(
            4, 64, 4, cross_attention_dim=256, caption_channels=128, in_channels=32, out_channels=32, audio_in_channels=32,
            audio_out_channels=32, audio_num_attention_heads=4, audio_attention_head_dim=32, audio_cross_attention_dim=128,
        ),
        (16, 22, 40),
        (8, 8, 16),
        ltx2,
        words=1024,
    ),
    "CogVideoX 5B 480p": Family(
        "CogVideoXTransformer3DModel",
        _sizes(48, 64, 42, use_rotary_positional_embeddings=True),
        _sizes(4, 64, 4, use_rotary_positional_embeddings=True, text_embed_dim=256, time_embed_dim=64),
        (13, 60, 90),
        SMALL_SIZE,
        cogvideox,
        words=226,
        levels=(FULL, DEFAULT),
    ),
    "ConsisID 5B 480p": Family(
        "ConsisIDTransformer3DModel",
        _sizes(48, 64, 42, in_channels=32, use_rotary_positional_embeddings=True, is_train_face=True),
        _sizes(
            4, 48, 4, in_channels=32, use_rotary_positional_embeddings=True, is_train_face=True, text_embed_dim=256, time_embed_dim=64,
            cross_attn_dim_head=32, cross_attn_num_heads=4, LFE_id_dim=64, LFE_vit_dim=64, LFE_depth=5, LFE_num_heads=2, LFE_output_dim=128,
        ),
        (13, 60, 90),
        SMALL_SIZE,
        consisid,
        words=226,
    ),
    "EasyAnimate 5.1 7B": Family(
        "EasyAnimateTransformer3DModel",
        {"in_channels": 16, "out_channels": 16, "patch_size": 2},
        _sizes(4, 64, 4, mmdit_layers=4, in_channels=16, out_channels=16, patch_size=2, text_embed_dim=256, time_embed_dim=64),
        (13, 48, 84),
        SMALL_SIZE,
        easyanimate,
        words=256,
    ),
    "Mochi 10B 480p": Family(
        "MochiTransformer3DModel",
        {},
        _sizes(4, 64, 4, pooled_projection_dim=128, text_embed_dim=256, time_embed_dim=64),
        (28, 60, 106),
        SMALL_SIZE,
        mochi,
        words=256,
        levels=(FULL, DEFAULT),
    ),
    "Latte 16x512x512": Family(
        "LatteTransformer3DModel",
        _latte := _sizes(
            16, 72, 28, in_channels=4, out_channels=8, patch_size=2, sample_size=64, caption_channels=4096, cross_attention_dim=1152,
            activation_fn="gelu-approximate", attention_bias=True, norm_type="ada_norm_single", norm_elementwise_affine=False,
            norm_eps=1e-6, num_embeds_ada_norm=1000, video_length=16,
        ),
        _latte | _sizes(4, 72, 4, sample_size=16, caption_channels=256, cross_attention_dim=288),
        (16, 64, 64),
        (16, 16, 16),
        latte,
        words=120,
        levels=(DEFAULT, QUICK),
    ),
    "Allegro 2.8B 720p": Family(
        "AllegroTransformer3DModel",
        {},
        _sizes(4, 48, 4, cross_attention_dim=192, caption_channels=128, sample_height=16, sample_width=32, sample_frames=8),
        (22, 90, 160),
        SMALL_SIZE,
        allegro,
    ),
    "Cosmos Predict1 7B 704p": Family(
        "CosmosTransformer3DModel",
        {"concat_padding_mask": False},  # a channel of zeros, which torchvision would have to resize
        _sizes(4, 64, 4, text_embed_dim=256, adaln_lora_dim=32, max_size=(16, 32, 32), concat_padding_mask=False),
        (16, 88, 160),
        SMALL_SIZE,
        cosmos,
    ),
    "Kandinsky 5 2B 512p": Family(
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168},
        {
            "in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 256, "ff_dim": 1024, "in_text_dim": 256, "in_text_dim2": 128,
            "time_dim": 128, "num_text_blocks": 1, "num_visual_blocks": 4,
        },
        (31, 64, 96),
        SMALL_SIZE,
        kandinsky,
        words=256,
    ),
    "SanaVideo 2B 480p": Family(
        "SanaVideoTransformer3DModel",
        {},
        _sizes(4, 32, 4, num_cross_attention_heads=4, cross_attention_head_dim=32, cross_attention_dim=128, caption_channels=128),
        (21, 60, 104),
        SMALL_SIZE,
        sana_video,
        words=300,
    ),
    "AnimateDiff 16x512x512": Family(
        "UNetMotionModel",
        {"cross_attention_dim": 768},
        {
            "block_out_channels": (64, 128), "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "cross_attention_dim": 64, "layers_per_block": 1,
        },
        (16, 64, 64),
        (8, 16, 16),
        animatediff,
        words=77,
    ),
}  # fmt: skip


def problem(family: Family, device: torch.device) -> Problem:
    import diffusers
    from tubelet.engine.adapters import accelerate

    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # a model of 13 B parameters in float32 would not fit beside its copy
        try:
            model = getattr(diffusers, family.kind)(**(family.config if on_gpu else family.small)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
    for parameter in model.parameters():
        if not parameter.count_nonzero():  # such layers would hide what is in front of them
            parameter.normal_(std=0.02)

    def make(seed: int) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        return family.call(draw, family.size if on_gpu else family.small_size, family.words if on_gpu else 32, model.config)

    @cache
    def variant(ours: bool, compiled: bool, precision: str | None = None) -> torch.nn.Module:
        """A model of its own with the same weights."""
        other = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        if ours and (notes := accelerate(other, precision=precision).notes):  # attention alone is not what the case is of
            raise Unsupported("; ".join(notes))
        if compiled:
            other.compile_repeated_blocks(fullgraph=False) if getattr(other, "_repeated_blocks", None) else other.compile()
        return other

    def implementation(name: str, ours: bool, compiled: bool = False, precision: str | None = None, **how) -> Implementation:
        def build(inputs: dict[str, Any]) -> Callable[[], Tensor]:
            module = variant(ours, compiled, precision)
            return lambda: step(module, inputs)

        return Implementation(name, build, needs=("diffusers",), ours=ours, slow=compiled, **how)

    @torch.no_grad()
    def step(module: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        return module(**inputs, return_dict=False)[0]

    implementations = [
        implementation("tubelet", True),
        implementation("diffusers", False),
        implementation("tubelet, torch.compile", True, True),
        implementation("diffusers, torch.compile", False, True),
    ]
    if on_gpu:  # a CPU has no products in FP8
        implementations.append(implementation("tubelet, FP8", True, precision="fp8", comparable=False, tolerance=FP8_TOLERANCE))
    return Problem(
        make=make,
        implementations=implementations,
        reference=lambda inputs: step(model, inputs),
        dtype=dtype,
        flops=0.0,
        bytes=float(sum(p.numel() * p.element_size() for p in model.parameters()) + storage_bytes(make(0))),
        tolerance=TOLERANCES[dtype],
        capturable=False,
    )


def cases() -> list[Case]:
    found = []
    for name, family in FAMILIES.items():
        for device, level, size in (("cuda", family.levels[0], family.size), ("cpu", family.levels[1], family.small_size)):
            shape = {"latents": "x".join(map(str, size)), "dtype": "bfloat16" if device == "cuda" else "float32", "model": family.kind}
            label = name if device == "cuda" else f"{name}, small"
            found.append(Case(OP, label, shape, lambda device, family=family: problem(family, device), level, None, (device,)))
    return found
