"""Who may attend to whom, said as a rule on coordinates.

Each mask is one predicate on the frame t of a query and the frame u of a key (and whether that key frame is known), plus whether the two
must lie at the same site (h, w). All of them are cases of `visible`, which uses only operators that ints, NumPy arrays, tensors and
Triton's blocks share: the dense reference, the schedule of the blocks, the kernels and other libraries' mask functions all come from it.

Clips never see each other. Text segments of a joint layout see, and are seen by, every token of their clip. Known frames are the prefix of
a prefix language model (Raffel et al. 2020): causal masks let every query of the clip see them, also from earlier frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

MOST = 1 << 14
"""Frames of a chunk or a sink, chunks of a window: kernels count in 32 bits."""


class Coordinates(NamedTuple):
    """Where tokens lie: integer tensors of one shape. `clip` is -1 past the end of a pack; t, h, w are 0 for text."""

    clip: torch.Tensor
    t: torch.Tensor
    h: torch.Tensor
    w: torch.Tensor
    text: torch.Tensor
    known: torch.Tensor

    def __getitem__(self, item):  # Coordinates of a subset, or broadcast against another set: c[:, None]
        return Coordinates(*(field[item] for field in tuple(self)))


def visible(t, u, known, causal, chunk, window, sink, sees_known):
    """May a query in frame t see a key in frame u? Broadcasts; `known` says whether frame u is known.

    Frames count in chunks: those of earlier and equal chunks are seen if `causal`, all of them else; of these, with a `window` (0: none),
    chunks less than `window` apart or frames before `sink`; and, if `sees_known`, every known frame.
    """
    seen = u // chunk <= t // chunk if causal else (u == u) & (t == t)
    if window > 0:
        near = (t // chunk - u // chunk < window) & (u // chunk - t // chunk < window)
        if sink > 0:
            near = near | (u < sink)
        seen = seen & near
    if sees_known:
        seen = seen | known
    return seen


class Rule(NamedTuple):
    """What `visible` asks of a mask."""

    causal: bool = False
    chunk: int = 1
    window: int = 0
    sink: int = 0
    sees_known: bool = False


@dataclass(frozen=True)
class Mask:
    """A rule on frames; `same_site` restricts it further to equal (h, w)."""

    same_site: ClassVar[bool] = False

    def as_rule(self) -> Rule:
        """The mask as a case of `visible`."""
        raise TypeError("Mask is abstract: use Full, Spatial, Temporal or FrameCausal")

    def rule(self, t: Any, u: Any, known: Any) -> Any:
        """May a query in frame t see a key in frame u? Broadcasts; `known` says whether frame u is known."""
        return visible(t, u, known, *self.as_rule())

    def allowed(self, query: Coordinates, key: Coordinates) -> torch.Tensor:
        """The whole predicate on token coordinates, a bool tensor of their broadcast shape."""
        video = self.rule(query.t, key.t, key.known)
        if self.same_site:
            video = video & (query.h == key.h) & (query.w == key.w)
        return (query.clip == key.clip) & (query.clip >= 0) & (video | query.text | key.text)


@dataclass(frozen=True)
class Full(Mask):
    """Every token of the clip."""

    def as_rule(self) -> Rule:
        return Rule()


@dataclass(frozen=True)
class Spatial(Mask):
    """Tokens of the same frame: u == t."""

    def as_rule(self) -> Rule:
        return Rule(window=1)


@dataclass(frozen=True)
class Temporal(Mask):
    """The same site in other frames: u <= t if causal, |t - u| < window if a window is given, and every known frame."""

    same_site: ClassVar[bool] = True
    causal: bool = True
    window: int | None = None

    def __post_init__(self):
        _check_count("window", self.window, optional=True)

    def as_rule(self) -> Rule:
        return Rule(self.causal, window=self.window or 0, sees_known=True)


@dataclass(frozen=True)
class FrameCausal(Mask):
    """Whole frames in chunks: u // chunk <= t // chunk; with a window of chunks, t // chunk - u // chunk < window or u < sink (frames); and
    known frames.
    """

    chunk: int = 1
    window: int | None = None
    sink: int = 0

    def __post_init__(self):
        _check_count("chunk", self.chunk)
        _check_count("window", self.window, optional=True)
        if not isinstance(self.sink, int) or not 0 <= self.sink <= MOST:
            raise ValueError(f"sink: expected a number of frames from 0 to {MOST}, got {self.sink!r}")

    def as_rule(self) -> Rule:
        return Rule(True, self.chunk, self.window or 0, self.sink, sees_known=True)


@dataclass(frozen=True)
class RuleMask(Mask):
    """Any rule: what a mask is once it has gone through an operator, which takes numbers only."""

    same_site: bool = False
    given: Rule = field(default_factory=Rule)

    @classmethod
    def of(cls, numbers: Sequence[int], same_site: bool) -> "RuleMask":
        """From the numbers of a Rule."""
        causal, chunk, window, sink, sees_known = numbers
        return cls(same_site, Rule(bool(causal), chunk, window, sink, bool(sees_known)))

    def as_rule(self) -> Rule:
        return self.given


def _check_count(name: str, value: int | None, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise ValueError(f"{name}: expected an integer from 1 to {MOST}{' or None' if optional else ''}, got {value!r}")
