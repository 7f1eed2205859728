"""What differs between two runs beyond the noise.

A difference counts if the quartiles of the two do not overlap and the medians differ by more than a margin: quartiles are the noise from
call to call, the margin that from run to run, of clocks and of where memory lies.
"""

from dataclasses import dataclass

from .record import Measurement, Run


@dataclass(frozen=True)
class Difference:
    """verdict: "same", "faster", "slower", "missing", "not run" (for want of time), "new", or how the status changed. ratio: time after to
    time before.
    """

    case: str
    implementation: str
    before: float | None
    after: float | None
    verdict: str
    regression: bool = False

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before and self.after else None


def compare(before: Run, after: Run, margin: float = 0.05, peers: bool = False) -> list[Difference]:
    """One for each implementation of a case that is in either: ours, or with `peers` all. A regression is one of ours that was right and
    timed and now is slower, or has no time; not one that was not run at all.
    """
    a, b, found = before.named(), after.named(), []
    left_out = {each.key[:2] for each in after.measurements if each.status == "not run"}
    for key in dict.fromkeys((*a, *b)):
        old, new = a.get(key), b.get(key)
        ours = (old or new).ours
        if not key[2] or not (ours or peers):
            continue
        name = f"{key[0]}, {key[1]}", key[2]
        if old is None or new is None:
            found.append(
                Difference(*name, _time(old), _time(new), "new" if old is None else "not run" if key[:2] in left_out else "missing")
            )
        elif old.status != new.status:
            lost = ours and old.status == "ok"
            found.append(
                Difference(*name, _time(old), _time(new), f"{old.status} -> {new.status}", lost or (ours and new.status == "wrong"))
            )
        elif old.status == "ok":
            slower = new.low > old.high and new.ms > old.ms * (1 + margin)
            faster = new.high < old.low and old.ms > new.ms * (1 + margin)
            verdict = "slower" if slower else "faster" if faster else "same"
            found.append(Difference(*name, old.ms, new.ms, verdict, ours and slower))
    return found


def _time(measurement: Measurement | None) -> float | None:
    return measurement.ms if measurement else None
