"""A pack as batches of sequences of one length, which is what other libraries take, and the reference of attention on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tubelet.kernels import Mask, Spatial


@dataclass(frozen=True)
class Group:
    """Neighbouring clips of one grid: their first token, their number, frames, sites; and where their keys lie, if elsewhere.

    kind: "frame" (each frame is a sequence), "site" or "clip".
    """

    kind: str
    start: int
    clips: int
    frames: int
    sites: int
    kv_start: int | None = None
    kv_length: int = 0

    @property
    def length(self) -> int:
        return {"frame": self.sites, "site": self.frames, "clip": self.frames * self.sites}[self.kind]

    @property
    def batch(self) -> int:
        return self.clips * {"frame": self.frames, "site": self.sites, "clip": 1}[self.kind]

    @property
    def keys(self) -> int:
        return self.length if self.kv_start is None else self.kv_length

    def split(self, x: Tensor) -> Tensor:
        """The sequences (batch, heads, length, head_dim) of x (tokens, heads, head_dim): a view, but for several clips by site."""
        x = x[self.start : self.start + self.clips * self.frames * self.sites]
        if self.kind != "site":
            return x.unflatten(0, (self.batch, self.length)).transpose(1, 2)
        return x.unflatten(0, (self.clips, self.frames, self.sites)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    def split_keys(self, x: Tensor) -> Tensor:
        """The same of keys or values."""
        if self.kv_start is None:
            return self.split(x)
        x = x[self.kv_start : self.kv_start + self.clips * self.kv_length]
        return x.unflatten(0, (self.clips, self.kv_length)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.kind != "site":
            return x.transpose(1, 2).flatten(0, 1)
        return x.unflatten(0, (self.clips, self.sites)).permute(0, 3, 1, 2, 4).flatten(0, 2)

    def mask(self, mask: Mask, device: torch.device, rows: slice = slice(None)) -> Tensor | None:
        """Who sees whom within a sequence, bool (length or rows, keys); None for all."""
        if self.kind == "frame" or self.kv_start is not None:
            return None
        t = torch.arange(self.frames, device=device)
        t = t if self.kind == "site" else t.repeat_interleave(self.sites)
        seen = mask.rule(t[rows, None], t[None], torch.zeros_like(t, dtype=torch.bool)[None])
        return seen.expand(len(t[rows]), len(t))


def groups(grids: Sequence[tuple[int, int, int]], mask: Mask, text: Sequence[int] | None = None) -> list[Group]:
    """Of a pack of grids; text: the keys of each clip, in a pack of their own."""
    kind = "site" if mask.same_site else "frame" if isinstance(mask, Spatial) else "clip"
    found, start, kv_start = [], 0, 0
    for i, (frames, height, width) in enumerate(grids):
        sites, keys = height * width, text[i] if text is not None else 0
        last = found[-1] if found else None
        # By frames, clips of one frame size are one batch whatever their lengths.
        if last and kind == "frame" and last.sites == sites:
            found[-1] = Group(kind, last.start, 1, last.clips * last.frames + frames, sites)
        elif last and (last.frames, last.sites, last.kv_length) == (frames, sites, keys):
            found[-1] = Group(kind, last.start, last.clips + 1, frames, sites, last.kv_start, keys)
        else:
            found.append(Group(kind, start, 1, frames, sites, kv_start if text is not None else None, keys))
        start, kv_start = start + frames * sites, kv_start + keys
    return found


def reference(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Group], mask: Mask, heads: Sequence[int], do: Tensor | None = None
) -> list[Tensor]:
    """[out] or, with do, [dq, dk, dv] of some heads, (tokens, len(heads), head_dim), in float64 (float32 for long sequences, where that
    would take minutes on most GPUs). k and v may have fewer heads than q only without do.
    """
    size = sum(part.batch * part.length * part.keys for part in parts)
    dtype = torch.float64 if size <= 1 << 30 else torch.float32
    shared = q.shape[1] // k.shape[1]
    q, k, v, do = (None if x is None else x[:, [h // n for h in heads]] for x, n in ((q, 1), (k, shared), (v, shared), (do, 1)))
    result = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in ((q,) if do is None else (q, k, v))]
    scale = 1 / math.sqrt(q.shape[-1])
    for part in parts:
        step = max(1, (1 << 25) // (part.length * part.keys * len(heads)))  # sequences at once
        rows = max(1, min(part.length, (1 << 25) // (part.keys * len(heads))))
        qs, dos = (None if x is None else part.split(x) for x in (q, do))
        ks, vs = part.split_keys(k), part.split_keys(v)
        found = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in ((qs,) if do is None else (qs, ks, vs))]
        for b in range(0, part.batch, step):
            here = slice(b, b + step)
            kb, vb = ks[here].to(dtype), vs[here].to(dtype)
            for r in range(0, part.length, rows):
                where = slice(r, r + rows)
                qb = qs[here, :, where].to(dtype)
                scores = qb @ kb.mT * scale
                seen = part.mask(mask, q.device, where)
                if seen is not None:
                    scores.masked_fill_(~seen, -torch.inf)
                weights = scores.softmax(dim=-1)
                out = weights @ vb
                if do is None:
                    found[0][here, :, where] = out
                    continue
                dob = dos[here, :, where].to(dtype)
                ds = weights * (dob @ vb.mT - (dob * out).sum(-1, keepdim=True))
                found[0][here, :, where] = ds @ kb * scale
                found[1][here] += ds.mT @ qb * scale
                found[2][here] += weights.mT @ dob
        for i, (into, x) in enumerate(zip(result, found, strict=True)):
            if i == 0 or part.kv_start is None:
                joined, start = part.join(x), part.start
            else:
                joined, start = x.transpose(1, 2).flatten(0, 1), part.kv_start
            into[start : start + len(joined)] = joined
    return result
