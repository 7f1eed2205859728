"""Attention as other libraries do it, from and to the tensors of a pack: q, k, v (tokens, heads, head_dim), views of one tensor.

Each peer gets the form that suits it best: batches where clips are alike, its own kind of block-diagonal mask where they are not. What it
has to rearrange for that is part of its time. Modules are imported by name when they are used: none of them is needed.
"""

import contextlib
import importlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tubelet.kernels import FrameCausal, Mask, VideoLayout
from tubelet.kernels.masks import Coordinates

from .harness import Implementation, Unsupported
from .sequences import Group

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BACKENDS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
LARGEST_DENSE = 4 << 30
"""Bytes of a matrix of scores, or of a mask, that a peer may make."""


class Setup(NamedTuple):
    """What a peer is made from: the pack as sequences, its layouts and its mask."""

    parts: Sequence[Group]
    layout: VideoLayout
    kv_layout: VideoLayout
    mask: Mask
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @property
    def cross(self) -> bool:
        return self.kv_layout is not self.layout


def by_parts(setup: Setup, attend: Callable[[Group, Tensor, Tensor, Tensor], Tensor], copy: bool = False) -> Attention:
    """Attention of each batch of sequences in turn; copy: of contiguous ones."""

    def run(q, k, v):
        outs = []
        for part in setup.parts:
            qkv = part.split(q), part.split_keys(k), part.split_keys(v)
            outs.append(part.join(attend(part, *((x.contiguous() for x in qkv) if copy else qkv))))
        return outs[0].contiguous() if len(outs) == 1 else torch.cat(outs)

    return run


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With a head of keys and values for each of q's: (..., heads, length, head_dim), for what takes no fewer."""
    groups = q.shape[-3] // k.shape[-3]
    return (q, k, v) if groups == 1 else (q, k.repeat_interleave(groups, dim=-3), v.repeat_interleave(groups, dim=-3))


def sdpa(q: Tensor, k: Tensor, v: Tensor, name: str | None, **options) -> Tensor:
    if name == "efficient":
        q, k, v = repeated(q, k, v)
    with backend(name):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def backend(name: str | None):
    """A context in which scaled_dot_product_attention runs by one back end alone."""
    if name is None:
        return contextlib.nullcontext()
    kernels = importlib.import_module("torch.nn.attention")
    return kernels.sdpa_kernel(getattr(kernels.SDPBackend, BACKENDS[name]))


def torch_attention(setup: Setup, name: str | None, copy: bool = False) -> Attention:
    """torch.nn.functional.scaled_dot_product_attention, batch by batch of sequences of one length."""
    masks = {}
    for part in setup.parts:
        masks[part] = _sdpa_mask(part, setup, name)
        if part.kind == "site" and part.batch > 65_535 and name != "efficient" and setup.device.type == "cuda":
            raise Unsupported(f"{part.batch} sequences: more than 65,535 in a batch fail (pytorch #146704)")

    return by_parts(setup, lambda part, q, k, v: sdpa(q, k, v, name, **masks[part]), copy)


def _sdpa_mask(part: Group, setup: Setup, name: str | None) -> dict:
    rule = setup.mask.as_rule()
    if part.kind == "frame" or setup.cross or not (rule.causal or rule.window):
        return {}
    if part.keys * part.length > LARGEST_DENSE:
        raise Unsupported("the mask would be a matrix of more than 4 GB")
    seen = part.mask(setup.mask, setup.device)
    if bool(seen.all()):
        return {}
    if part.kind == "site" and torch.equal(seen, torch.ones_like(seen).tril()):
        return {"is_causal": True}
    if name == "flash":
        raise Unsupported("flash takes no mask")
    return {"attn_mask": seen}


def by_chunks(setup: Setup, name: str | None) -> Attention:
    """Frame-causal attention as a loop over the chunks, each over the keys that it sees."""
    mask = setup.mask
    if not isinstance(mask, FrameCausal):
        raise Unsupported("a loop over chunks is for frame-causal masks")
    if mask.sink and mask.window:
        raise Unsupported("with a sink a chunk's keys are in two places")

    def attend(part, q, k, v):
        outs, size = [], mask.chunk * part.sites
        for start in range(0, part.length, size):
            first = max(0, start - size * (mask.window - 1)) if mask.window else 0
            keys = slice(first, start + size)
            outs.append(sdpa(q[:, :, start : start + size], k[:, :, keys], v[:, :, keys], name))
        return torch.cat(outs, dim=2)

    return by_parts(setup, attend)


def eager(setup: Setup, compiled: bool = False) -> Attention:
    """The plain expression, as Open-Sora and others write it; or that, compiled."""
    scale, hidden = setup.head_dim**-0.5, {}
    for part in setup.parts:
        if part.batch * setup.heads * part.length * part.keys * 4 > LARGEST_DENSE:
            raise Unsupported("the scores would take more than 4 GB")
        seen = part.mask(setup.mask, setup.device)
        hidden[part] = None if seen is None or bool(seen.all()) else ~seen

    def expression(q, k, v, hide):
        scores = q @ k.mT * scale
        if hide is not None:
            scores = scores.masked_fill(hide, -torch.inf)
        return scores.float().softmax(dim=-1).to(v.dtype) @ v

    run = compile_(expression) if compiled else expression
    return by_parts(setup, lambda part, q, k, v: run(*repeated(q, k, v), hidden[part]))


def compile_(function: Callable, **options) -> Callable:
    """torch.compile of a function, for the shapes that it is called with."""
    with contextlib.suppress(Exception):  # else a backward pass cannot run twice
        importlib.import_module("torch._functorch.config").donated_buffer = False
    return torch.compile(function, dynamic=False, **options)


def site_order(setup: Setup) -> tuple[Tensor, Tensor] | None:
    """For masks of single sites: the tokens by clip, site and frame, and the inverse of that order; None for others."""
    if not setup.mask.same_site:
        return None
    order = []
    for part in setup.parts:
        tokens = torch.arange(part.clips * part.frames * part.sites, device=setup.device) + part.start
        order.append(tokens.view(part.clips, part.frames, part.sites).transpose(1, 2).flatten())
    order = torch.cat(order)
    return order, torch.argsort(order)


def in_order(setup: Setup, attend: Attention) -> Attention:
    """With the tokens of a site side by side, where the mask is of sites: for libraries that take sequences one after the other."""
    orders = site_order(setup)
    if orders is None:
        return attend
    order, inverse = orders
    return lambda q, k, v: attend(q[order], k[order], v[order])[inverse]


def lengths(setup: Setup) -> tuple[list[int], list[int]]:
    """Of all sequences, in the order of `in_order`: of queries, and of keys."""
    parts = setup.parts
    return [part.length for part in parts for _ in range(part.batch)], [part.keys for part in parts for _ in range(part.batch)]


def causal(setup: Setup) -> bool:
    """Whether each sequence is causal token by token; raises Unsupported where the mask is neither that nor full."""
    rule = setup.mask.as_rule()
    if setup.parts[0].kind == "frame" or not (rule.causal or rule.window):
        return False
    if setup.mask.same_site and rule.causal and not rule.window:
        return True
    raise Unsupported("its masks are full or causal by token")


def xformers(setup: Setup) -> Attention:
    ops = importlib.import_module("xformers.ops")
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths(setup), device=setup.device)
    bias = bias.make_causal() if causal(setup) else bias

    def attend(q, k, v):
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

    return in_order(setup, attend)


def flash_varlen(setup: Setup, module: str) -> Attention:
    """flash_attn_varlen_func, which FlashAttention 2, 3 and 4 have in modules of their own."""
    function = importlib.import_module(module).flash_attn_varlen_func
    of_queries, of_keys = lengths(setup)
    starts = [F.pad(torch.tensor(each, device=setup.device).cumsum(0), (1, 0)).to(torch.int32) for each in (of_queries, of_keys)]
    options = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": max(of_queries), "max_seqlen_k": max(of_keys)}
    options["causal"] = causal(setup)

    def attend(q, k, v):
        out = function(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return in_order(setup, attend)


def flex(setup: Setup, flash: bool = False) -> Attention:
    """FlexAttention on the whole pack, its mask function made from this project's predicate."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    orders = site_order(setup)
    places = []
    for layout in (setup.layout, setup.kv_layout):
        where = layout.coordinates
        places.append(Coordinates(*(x if orders is None else x[orders[0]] for x in where)))
    queries, keys = places

    def seen(b, h, i, j):
        return setup.mask.allowed(queries[i], keys[j])

    # Compiled, since a matrix of all pairs is made else.
    make = compile_(module.create_block_mask) if setup.device.type == "cuda" else module.create_block_mask
    blocks = make(seen, None, None, setup.layout.tokens, setup.kv_layout.tokens, device=setup.device)
    run, options = compile_(module.flex_attention), {"kernel_options": {"BACKEND": "FLASH"}} if flash else {}

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return run(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1], **options)[0].transpose(0, 1).contiguous()

    return in_order(setup, attend)


def sage(setup: Setup) -> Attention:
    function = importlib.import_module("sageattention").sageattn
    if setup.head_dim not in (64, 96, 128):
        raise Unsupported("head dims 64, 96 and 128 alone")
    is_causal = causal(setup)
    return by_parts(setup, lambda part, q, k, v: function(*repeated(q, k, v), tensor_layout="HND", is_causal=is_causal))


class Peer(NamedTuple):
    """How a peer is made ready; gpu: whether it is for GPUs alone; backward: whether it can differentiate; slow: as of Implementation."""

    name: str
    make: Callable[[Setup], Attention]
    needs: tuple[str, ...] = ()
    gpu: bool = True
    backward: bool = True
    slow: bool = False


PEERS = (
    Peer("torch SDPA", partial(torch_attention, name=None), gpu=False),
    Peer("torch SDPA, copies", partial(torch_attention, name=None, copy=True), gpu=False),
    *(Peer(f"torch SDPA {name}", partial(torch_attention, name=name)) for name in BACKENDS),
    Peer("torch SDPA chunk by chunk", partial(by_chunks, name=None), gpu=False),
    Peer("eager torch", eager, gpu=False),
    Peer("torch.compile", partial(eager, compiled=True), slow=True),
    Peer("FlexAttention", flex, slow=True),
    Peer("FlexAttention FLASH", partial(flex, flash=True), ("flash_attn.cute",), slow=True),
    Peer("xFormers", xformers, ("xformers.ops",)),
    Peer("FlashAttention 2", partial(flash_varlen, module="flash_attn"), ("flash_attn",)),
    Peer("FlashAttention 3", partial(flash_varlen, module="flash_attn_interface"), ("flash_attn_interface",)),
    Peer("FlashAttention 4", partial(flash_varlen, module="flash_attn.cute"), ("flash_attn.cute",)),
    Peer("SageAttention", sage, ("sageattention",), backward=False),
)


def attention_peers(setup: Setup, call: Callable[[Attention, object], Callable], backward: bool) -> list[Implementation]:
    """Those that are for this device; `call` makes what is timed from an attention and a set of inputs."""
    found = []
    for peer in PEERS:
        if (peer.gpu and setup.device.type != "cuda") or (backward and not peer.backward):
            continue
        if "chunk" in peer.name and not isinstance(setup.mask, FrameCausal):
            continue
        if peer.name == "torch SDPA, copies" and not setup.mask.same_site:
            continue
        ready = cache(partial(peer.make, setup))
        found.append(Implementation(peer.name, lambda inputs, ready=ready: call(ready(), inputs), peer.needs, slow=peer.slow))
    return found
