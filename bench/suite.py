"""All cases, in the order in which they run: what tells most comes first, since a run may be interrupted, or its time be over."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from . import adapters, attention, block, fp8, graphs, group_norm, guidance, norms, packing, patch_embed, rotary, sampling, temporal
from .harness import Case
from .record import LEVELS

MODULES = (temporal, attention, norms, rotary, patch_embed, fp8, guidance, group_norm, block, adapters, graphs, packing, sampling)


def every() -> list[Case]:
    """Raises ValueError if two have one name."""
    found = list(chain.from_iterable(module.cases() for module in MODULES))
    seen = set()
    for case in found:
        for device in case.devices:
            if (device, case.id) in seen:
                raise ValueError(f"two cases have the name {case.id!r}")
            seen.add((device, case.id))
    return found


def select(device: str, level: str, only: Sequence[str] = ()) -> list[Case]:
    """Those of a kind of device and of a level and those below, whose op or name contains one of `only`, if that is given. Those of the
    lower level come first; within a level each op has its turn, and a series is one turn, so that no op is without any when time is short.
    Raises ValueError if a word of `only` fits none.
    """
    possible = [case for case in every() if device in case.devices]
    cases = [case for case in possible if case.level <= LEVELS.index(level)]
    for word in only:
        if not any(word.lower() in case.id.lower() for case in cases):
            higher = min((case.level for case in possible if word.lower() in case.id.lower()), default=None)
            if higher is not None:
                raise ValueError(f"--only: a {level} run has no case with {word!r} in its name, a {LEVELS[higher]} one has")
            ops = ", ".join(dict.fromkeys(case.op for case in cases))
            raise ValueError(f"--only: no case has {word!r} in its name; the ops are {ops}")
    chosen = [case for case in cases if not only or any(word.lower() in case.id.lower() for word in only)]
    turns, taken = {}, Counter()
    for case in chosen:
        key = case.level, case.op, case.series or case.name
        if key not in turns:
            turns[key] = taken[key[:2]]
            taken[key[:2]] += 1
    return sorted(chosen, key=lambda case: (case.level, turns[case.level, case.op, case.series or case.name]))
