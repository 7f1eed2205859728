"""LTX-2, 2.3 and 2.5 (HaCohen et al. 2026): a video and its sound, two streams that attend to each other.

What is computed otherwise than in diffusers: a timestep for each token of a video is a few timesteps, and the index of each token's; the
padding of texts is a number of tokens for each; angles are tables of pairs, made once and not by each layer; the host waits for no mask.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers import transformer_ltx2 as ltx2
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from . import ops
from .fp8 import Rows, takes
from .functions import masked_attention
from .swaps import PASSES_ON, Processor, Swaps, are_served, takes_fp8

STREAMS = ("", "audio_")
"""How names begin in a module that has parts of the video and parts of the sound."""
ATTENTION = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
NORMS = ("norm1", "norm2", "norm3", "audio_norm1", "audio_norm2", "audio_norm3", "audio_to_video_norm", "video_to_audio_norm")
PROCESSORS = ltx2.LTX2AudioVideoAttnProcessor, ltx2.LTX2PerturbedAttnProcessor
OF_PAIRS = "video_self_attention_mask, in calls that give it: torch's SDPA"
OF_HEADS = "a number for each head of each token"
PERTURBED = "values in the place of attention, by torch's lerp where a mask says which entries"
NO_NORM = "a scale and a shift without a norm"
Step = Tensor | tuple[Tensor, Tensor]
"""Modulation (batch, n, parts * channels), of n stretches of tokens, or rows (n, parts * channels) and the row of each token (tokens,)."""


class Angles(NamedTuple):
    """Tables (batch, tokens, heads, pairs)."""

    cos: Tensor
    sin: Tensor


class Turned(NamedTuple):
    """Queries and keys (batch, tokens, heads, head_dim) after norms and rotation."""

    q: Tensor
    k: Tensor


Rotary = tuple[Tensor, Tensor] | Angles | None
"""As the library's modules make them, or as tables of pairs."""


def swap(swaps: Swaps) -> None:
    """Serve an LTX2VideoTransformer3DModel."""
    blocks = [swap_block(swaps, where) for where, _ in list(swaps.named(ltx2.LTX2VideoTransformerBlock))]
    sites = {"timesteps of tokens": ("modulated_norm", "gated_residual"), "masks of texts": ("attention",)}
    if not all(blocks):
        for site in sites:
            swaps.leave(site, "", PASSES_ON, servable=True)
    elif swaps.forward("", forward, sites, kind=ltx2.LTX2VideoTransformer3DModel):
        for of in STREAMS:
            swaps.last_layer(f"{of}norm_out", f"{of}proj_out")
    swaps.leave("masks of pairs", "", OF_PAIRS)


def swap_block(swaps: Swaps, where: str) -> bool:
    """Serve a block; whether its forward and its attention could be replaced."""
    module, served = swaps.module(where), []
    for name in ATTENTION:
        at = f"{where}.{name}"
        served.append(swaps.processor(at, attend, PROCESSORS, "qk_norm_rope", "attention", norms=("norm_q", "norm_k")))
        if swaps.module(at).to_gate_logits is not None:
            swaps.leave("gates of heads", at, OF_HEADS)
        if module.perturbed_attn and name.endswith("attn1"):
            swaps.leave("perturbation", at, PERTURBED)
    if module.cross_attn_adaln:
        swaps.leave("modulation of texts", where, NO_NORM)
    swaps.linears(where)
    for of in STREAMS:
        swaps.feed_forward(f"{where}.{of}ff")
    return swaps.block(where, block, ltx2.LTX2VideoTransformerBlock, *NORMS) and all(served)


# ------------------------------------------------------------------------------------------------------------------------- attention


def attend(
    attn: nn.Module,
    hidden_states: Rows,
    encoder_hidden_states: Rows | None = None,
    attention_mask: Tensor | None = None,
    query_rotary_emb: Rotary | Turned = None,
    key_rotary_emb: Rotary = None,
    perturbation_mask: Tensor | None = None,
    all_perturbed: bool | Tensor | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What LTX2AudioVideoAttnProcessor and LTX2PerturbedAttnProcessor compute. attention_mask: or how many keys of each entry are there,
    the first, int32 (batch,). query_rotary_emb: or what was turned already.
    """
    text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    v = attn.to_v(text).unflatten(2, (attn.heads, -1))
    if all_perturbed is True:  # a tensor is of the library's own forward, and the host does not wait for it
        return finish(attn, hidden_states, v)
    if isinstance(query_rotary_emb, Turned):
        q, k = query_rotary_emb
    else:
        q, k = attn.to_q(hidden_states), attn.to_k(text)
        if key_rotary_emb is None:
            q, k = norm_rope(attn, q, k, attn.norm_q, attn.norm_k, query_rotary_emb, swaps)
        else:  # in a block that is not served
            q, _ = norm_rope(attn, q, q, attn.norm_q, attn.norm_q, query_rotary_emb, swaps)
            k, _ = norm_rope(attn, k, k, attn.norm_k, attn.norm_k, key_rotary_emb, swaps)
    lengths = mask = attention_mask
    if is_of_pairs(mask):
        out = masked_attention(q, k, v, mask if mask.dim() == 4 else mask[:, None], swaps=swaps)
    else:
        keys = k, v
        if mask is not None and mask.dim() > 1:
            lengths, *keys = ops.ordered(mask, k, v)
        cross = encoder_hidden_states is not None or lengths is not None
        out = ops.attend(q, *keys, cross=cross, lengths=lengths, swaps=swaps)
    if perturbation_mask is not None:
        out = torch.lerp(v, out, perturbation_mask.to(v)[..., None])
    return finish(attn, hidden_states, out)


def is_of_pairs(mask: Tensor | None) -> bool:
    """Whether a mask (batch, [1,] queries, keys) says more than which keys of each entry are there."""
    return mask is not None and mask.dim() > 2 and mask.shape[-2] > 1


def norm_rope(
    attn: nn.Module, q: Tensor, k: Tensor, q_norm: nn.Module, k_norm: nn.Module, rotary_emb: Rotary, swaps: Swaps
) -> Turned:  # fmt: skip
    """q and k (batch, tokens, channels) after the norms, turned by one table."""
    angles = angles_of(attn, rotary_emb)
    heads = attn.heads if angles is None else angles.cos.shape[2]  # halves are of the table's heads
    cos, sin = (None, None) if angles is None else angles
    q, k = (x.unflatten(2, (heads, -1)) for x in (q, k))
    q, k = ops.norm_rope(
        q, k, q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin, across_heads=True, interleaved=attn.rope_type == "interleaved", swaps=swaps
    )
    return Turned(*(x if heads == attn.heads else x.flatten(2).unflatten(2, (attn.heads, -1)) for x in (q, k)))


def angles_of(attn: nn.Module, rotary_emb: Rotary) -> Angles | None:
    """The library's tables are (batch, tokens, channels) of neighbours, or (batch, heads, tokens, pairs) of halves."""
    if rotary_emb is None or isinstance(rotary_emb, Angles):
        return rotary_emb
    if attn.rope_type == "split":
        return Angles(*(table.transpose(1, 2).float() for table in rotary_emb))
    return Angles(*(table[..., ::2].unflatten(2, (attn.heads, -1)).float().contiguous() for table in rotary_emb))


def finish(attn: nn.Module, hidden_states: Rows, out: Tensor) -> Tensor:
    """The gates of heads, and the last projection."""
    if attn.to_gate_logits is not None:
        out = out * (2 * attn.to_gate_logits(hidden_states).sigmoid())[..., None]
    out = out.flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out


def queries(attn: nn.Module) -> list[nn.Module]:
    """The linears that read what the queries are made of."""
    return [attn.to_q] if attn.to_gate_logits is None else [attn.to_q, attn.to_gate_logits]


# ---------------------------------------------------------------------------------------------------------------------------- blocks


def block(
    module: nn.Module,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Step,
    temb_audio: Step,
    temb_ca_scale_shift: Step,
    temb_ca_audio_scale_shift: Step,
    temb_ca_gate: Step,
    temb_ca_audio_gate: Step,
    temb_prompt: Tensor | None = None,
    temb_prompt_audio: Tensor | None = None,
    video_rotary_emb: Rotary = None,
    audio_rotary_emb: Rotary = None,
    ca_video_rotary_emb: Rotary = None,
    ca_audio_rotary_emb: Rotary = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    self_attention_mask: Tensor | None = None,
    audio_self_attention_mask: Tensor | None = None,
    a2v_cross_attention_mask: Tensor | None = None,
    v2a_cross_attention_mask: Tensor | None = None,
    use_a2v_cross_attention: bool = True,
    use_v2a_cross_attention: bool = True,
    perturbation_mask: Tensor | None = None,
    all_perturbed: bool | Tensor | None = None,
    *,
    swaps: Swaps,
) -> tuple[Tensor, Tensor]:
    """What LTX2VideoTransformerBlock computes."""
    more = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed} if module.perturbed_attn else {}
    text = modulated_text(module, "", encoder_hidden_states, temb_prompt)
    more |= {"attention_mask": self_attention_mask, "query_rotary_emb": video_rotary_emb}
    video, mlp = through_text(module, "", hidden_states, text, encoder_attention_mask, temb, more, swaps)
    text = modulated_text(module, "audio_", audio_encoder_hidden_states, temb_prompt_audio)
    more |= {"attention_mask": audio_self_attention_mask, "query_rotary_emb": audio_rotary_emb}
    audio, audio_mlp = through_text(module, "audio_", audio_hidden_states, text, audio_encoder_attention_mask, temb_audio, more, swaps)
    if use_a2v_cross_attention or use_v2a_cross_attention:
        a2v, v2a = module.audio_to_video_attn, module.video_to_audio_attn
        fp8 = takes_fp8(a2v, *queries(a2v)), takes_fp8(v2a, v2a.to_k, v2a.to_v)
        table, norm = module.video_a2v_cross_attn_scale_shift_table, module.audio_to_video_norm
        video, seen, heard = for_each_other(video, norm, table, temb_ca_scale_shift, temb_ca_gate, fp8, swaps)
        fp8 = takes_fp8(a2v, a2v.to_k, a2v.to_v), takes_fp8(v2a, *queries(v2a))
        table, norm = module.audio_a2v_cross_attn_scale_shift_table, module.video_to_audio_norm
        audio, keys, asks = for_each_other(audio, norm, table, temb_ca_audio_scale_shift, temb_ca_audio_gate, fp8, swaps)
        of_a2v, of_v2a = (ca_video_rotary_emb, ca_audio_rotary_emb), (ca_audio_rotary_emb, ca_video_rotary_emb)
        if use_a2v_cross_attention and use_v2a_cross_attention and all(isinstance(attn.processor, Processor) for attn in (a2v, v2a)):
            # The queries of one and the keys of the other are of the same tokens, turned by the same angles.
            q, k2 = norm_rope(a2v, a2v.to_q(seen), v2a.to_k(heard), a2v.norm_q, v2a.norm_k, ca_video_rotary_emb, swaps)
            q2, k = norm_rope(v2a, v2a.to_q(asks), a2v.to_k(keys), v2a.norm_q, a2v.norm_k, ca_audio_rotary_emb, swaps)
            of_a2v, of_v2a = (Turned(q, k), None), (Turned(q2, k2), None)
        if use_a2v_cross_attention:
            video = video._replace(y=a2v(seen, keys, a2v_cross_attention_mask, *of_a2v))
        if use_v2a_cross_attention:
            audio = audio._replace(y=v2a(asks, heard, v2a_cross_attention_mask, *of_v2a))
    return through_ff(module, "", video, mlp, swaps), through_ff(module, "audio_", audio, audio_mlp, swaps)


class Stream(NamedTuple):
    """Hidden states x, to which the next norm adds y, if there is one, times a gate with rows."""

    x: Tensor
    y: Tensor | None
    gate: Tensor | None
    rows: Tensor | None


def through_text(
    module: nn.Module, of: str, x: Tensor, text: Tensor, mask: Tensor | None, temb: Step, more: dict[str, Any], swaps: Swaps
) -> tuple[Stream, tuple[Tensor | None, ...]]:
    """A stream's attention to itself, which takes `more`, and to its text; and shift, scale, gate and rows of its feed-forward."""
    attn, attn2, norm, norm2 = (getattr(module, of + name) for name in ("attn1", "attn2", "norm1", "norm2"))
    (shift, scale, gate, shift2, scale2, gate2, *of_text), rows = parts(getattr(module, f"{of}scale_shift_table"), temb)
    text_shift, text_scale, text_gate = of_text or (None, None, None)
    how, x = {"rows": rows, "swaps": swaps}, ops.promoted(x, gate)
    h = ops.modulate(x, norm, shift, scale, fp8=takes_fp8(attn, *queries(attn), attn.to_k, attn.to_v), **how)
    y = attn(h, **more)
    x, h = ops.gate_and_modulate(x, y, gate, norm2, text_shift, text_scale, fp8=takes_fp8(attn2, *queries(attn2)), **how)
    y = attn2(h, encoder_hidden_states=text, attention_mask=mask)
    return Stream(x, y, text_gate, rows), (shift2, scale2, gate2, rows)


def for_each_other(
    stream: Stream, norm: nn.Module, table: Tensor, step: Step, gate_step: Step, fp8: tuple[bool, bool], swaps: Swaps
) -> tuple[Stream, Rows, Rows]:
    """A stream with the gate of what it hears or sees, its norm for what the video hears, and that for what the sound sees."""
    (scale, shift, scale2, shift2), rows = parts(table[:4], step)
    (gate,), gate_rows = parts(table[4:], gate_step)
    x, h = add(stream, norm, shift, scale, rows, fp8[0], swaps)
    h2 = ops.modulate(x, norm, shift2, scale2, rows=rows, fp8=fp8[1], swaps=swaps)
    return Stream(x, None, gate, gate_rows), h, h2


def through_ff(module: nn.Module, of: str, stream: Stream, mlp: tuple[Tensor | None, ...], swaps: Swaps) -> Tensor:
    """A stream's feed-forward."""
    (shift, scale, gate, rows), ff = mlp, getattr(module, f"{of}ff")
    x, h = add(stream, getattr(module, f"{of}norm3"), shift, scale, rows, takes(ff, ff.net[0].proj), swaps)
    return ops.gate(x, ff(h), gate, rows=rows, swaps=swaps)


def add(
    stream: Stream, norm: nn.Module, shift: Tensor, scale: Tensor, rows: Tensor | None, fp8: bool, swaps: Swaps
) -> tuple[Tensor, Rows]:  # fmt: skip
    """What is to be added to a stream, and the norm of that: one pass where both have the same rows."""
    x, y, gate, gate_rows = stream
    if y is not None and (gate is None or gate_rows is rows):
        return ops.gate_and_modulate(x, y, gate, norm, shift, scale, rows=rows, fp8=fp8, swaps=swaps)
    if y is not None:
        x = ops.gate(x, y, gate, rows=gate_rows, swaps=swaps)
    return x, ops.modulate(x, norm, shift, scale, rows=rows, fp8=fp8, swaps=swaps)


def parts(table: Tensor, step: Step) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The parts of a step's modulation with a layer's own table added, and the row of each token in them."""
    step, rows = step if isinstance(step, tuple) else (step, None)
    return (table.to(step.device) + step.unflatten(-1, (len(table), -1))).unbind(-2), rows


def modulated_text(module: nn.Module, of: str, text: Tensor, step: Tensor | None) -> Tensor:
    """A text as a block of LTX-2.3 reads it, by a step's modulation or by a table of the layer alone."""
    if not module.cross_attn_adaln:
        return text
    table = getattr(module, f"{of}prompt_scale_shift_table")
    shift, scale = table.to(text).unbind(0) if step is None else parts(table, step)[0]
    return torch.addcmul(shift, text, 1 + scale)


# ---------------------------------------------------------------------------------------------------------------------------- models


def are_ours(blocks: Iterable[nn.Module]) -> bool:
    """Whether all of these blocks, and their attention, take what the library's would not."""
    blocks = list(blocks)
    return are_served(blocks) and all(isinstance(getattr(block, name).processor, Processor) for block in blocks for name in ATTENTION)


def forward(self: nn.Module, *args, swaps: Swaps, **kwargs) -> ltx2.AudioVisualModelOutput | tuple[Tensor, Tensor]:
    """What LTX2VideoTransformer3DModel computes; its own forward gives processors of others what they know."""
    if are_ours(self.transformer_blocks):
        return served_forward(self, *args, swaps=swaps, **kwargs)
    return type(self).forward(self, *args, **kwargs)


@apply_lora_scale("attention_kwargs")
def served_forward(
    self: nn.Module,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    timestep: Tensor,
    audio_timestep: Tensor | None = None,
    sigma: Tensor | None = None,
    audio_sigma: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float = 24.0,
    audio_num_frames: int | None = None,
    video_coords: Tensor | None = None,
    audio_coords: Tensor | None = None,
    isolate_modalities: bool = False,
    spatio_temporal_guidance_blocks: list[int] | None = None,
    perturbation_mask: Tensor | None = None,
    use_cross_timestep: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    video_self_attention_mask: Tensor | None = None,
    video_keyframes_mask: Tensor | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> ltx2.AudioVisualModelOutput | tuple[Tensor, Tensor]:
    """What LTX2VideoTransformer3DModel computes with all of its blocks served."""
    batch, device, audio_device = len(hidden_states), hidden_states.device, audio_hidden_states.device
    audio_timestep = timestep if audio_timestep is None else audio_timestep
    audio_sigma = sigma if audio_sigma is None else audio_sigma
    if video_coords is None:
        video_coords = self.rope.prepare_video_coords(batch, num_frames, height, width, device, fps=fps)
    if audio_coords is None:
        audio_coords = self.audio_rope.prepare_audio_coords(batch, audio_num_frames, audio_device)
    first = self.transformer_blocks[0]
    rotary_emb = (
        angles_of(first.attn1, self.rope(video_coords, device=device)),
        angles_of(first.audio_attn1, self.audio_rope(audio_coords, device=audio_device)),
        angles_of(first.audio_to_video_attn, self.cross_attn_rope(video_coords[:, :1], device=device)),
        angles_of(first.video_to_audio_attn, self.cross_attn_audio_rope(audio_coords[:, :1], device=audio_device)),
    )
    x, audio = self.proj_in(hidden_states), self.audio_proj_in(audio_hidden_states)
    if self.config.use_keyframes_abs_pos_embedding and video_keyframes_mask is not None:
        x = x + (video_keyframes_mask > 0).to(x) * self.keyframes_abs_pos_embedding.to(x)

    def steps(embed: nn.Module, of: tuple[Tensor, Tensor | None], like: Tensor) -> tuple[Step, Step]:
        timestep, rows = of
        made = embed(timestep, batch_size=batch, hidden_dtype=like.dtype)
        return tuple(each.unflatten(0, (batch, -1)) if rows is None else (each, rows) for each in made)

    of_video, of_audio = (timestep.flatten(), None), (audio_timestep.flatten(), None)
    if timestep.numel() > batch:
        of_video = ops.distinct(timestep, batch * (num_frames or 1))
    temb, embedded = steps(self.time_embed, of_video, x)
    temb_audio, audio_embedded = steps(self.audio_time_embed, of_audio, audio)
    prompt = prompt_audio = None
    if self.prompt_modulation and self.config.use_prompt_adaln_single:
        prompt, _ = steps(self.prompt_adaln, (sigma.flatten(), None), x)
        prompt_audio, _ = steps(self.audio_prompt_adaln, (audio_sigma.flatten(), None), audio)
    if use_cross_timestep:
        of_video, of_audio = (audio_sigma.flatten(), None), (sigma.flatten(), None)
    cross = [steps(self.av_cross_attn_video_scale_shift, of_video, x)[0], steps(self.av_cross_attn_audio_scale_shift, of_audio, audio)[0]]
    factor = self.config.cross_attn_timestep_scale_multiplier / self.config.timestep_scale_multiplier
    of_video, of_audio = ((each * factor, rows) for each, rows in (of_video, of_audio))
    cross += [steps(self.av_cross_attn_video_a2v_gate, of_video, x)[0], steps(self.av_cross_attn_audio_v2a_gate, of_audio, audio)[0]]
    text, audio_text = encoder_hidden_states, audio_encoder_hidden_states
    if self.config.use_prompt_embeddings:
        text, audio_text = self.caption_projection(text), self.audio_caption_projection(audio_text)
        text, audio_text = text.view(batch, -1, x.shape[-1]), audio_text.view(batch, -1, audio.shape[-1])
    mask, text = ordered(encoder_attention_mask, text, prompt)
    audio_mask, audio_text = ordered(audio_encoder_attention_mask, audio_text, prompt_audio)
    pairs = None if video_self_attention_mask is None else as_bias(video_self_attention_mask, x)
    if perturbation_mask is not None and perturbation_mask.dim() == 1:
        perturbation_mask = perturbation_mask[:, None, None]
    perturbed = set(spatio_temporal_guidance_blocks or ())
    given = temb, temb_audio, *cross, prompt, prompt_audio, *rotary_emb, mask, audio_mask, pairs, None, None, None
    given = *given, not isolate_modalities, not isolate_modalities
    for i, layer in enumerate(self.transformer_blocks):
        how = (perturbation_mask, perturbation_mask is None) if i in perturbed else (None, False)
        x, audio = ops.checkpointed(self, layer, x, audio, text, audio_text, *given, *how)
    outs = finish_stream(self, "", x, embedded, swaps), finish_stream(self, "audio_", audio, audio_embedded, swaps)
    return ltx2.AudioVisualModelOutput(*outs) if return_dict else outs


def finish_stream(self: nn.Module, of: str, x: Tensor, embedded: Step, swaps: Swaps) -> Tensor:
    """A stream's last norm and projection."""
    table, linear, norm = (getattr(self, of + name) for name in ("scale_shift_table", "proj_out", "norm_out"))
    embedded, rows = embedded if isinstance(embedded, tuple) else (embedded, None)
    shift, scale = (table + embedded[..., None, :]).unbind(-2)
    return ops.project(x, linear, norm, shift, scale, rows=rows, swaps=swaps)


def as_bias(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to scores, of a mask with 1 for what is seen."""
    return (1 - mask.to(like.dtype)) * -10000.0


def ordered(mask: Tensor | None, text: Tensor, prompt: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """How many of a text's tokens are there, and the text with these first; a mask of more than that, as it is."""
    if mask is not None and mask.dim() == 2:
        mask = as_bias(mask, text)[:, None]
    if mask is None or is_of_pairs(mask) or (prompt is not None and prompt.shape[1] > 1):
        return mask, text
    return ops.ordered(mask, text)
