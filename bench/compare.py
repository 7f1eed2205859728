"""What differs between two runs beyond the noise (`record.beyond_noise`)."""

from dataclasses import dataclass

from .record import Measurement, Run, beyond_noise


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
    timed and now is slower, or has no time, be it that its whole case could not be made; not one that was not run, or is no longer there.
    """
    a, b, found = before.named(), after.named(), []
    blanks = {each.key[:2]: each.status for each in after.measurements if not each.implementation}  # of cases as a whole
    for key in dict.fromkeys((*a, *b)):
        old, new = a.get(key), b.get(key)
        ours = (old or new).ours
        if not key[2] or not (ours or peers):
            continue
        name = f"{key[0]}, {key[1]}", key[2]
        if old is None:
            found.append(Difference(*name, None, _time(new), "new"))
        elif new is None:
            status = blanks.get(key[:2], "missing")
            lost = ours and old.status == "ok" and status not in ("missing", "not run")
            found.append(Difference(*name, _time(old), None, f"{old.status} -> {status}" if lost else status, lost))
        elif old.status != new.status:
            lost = ours and old.status == "ok"
            found.append(
                Difference(*name, _time(old), _time(new), f"{old.status} -> {new.status}", lost or (ours and new.status == "wrong"))
            )
        elif old.status == "ok":
            in_graph = bool(old.graph_ms and new.graph_ms)  # which then is what reports tell
            was, now = old.times(in_graph), new.times(in_graph)
            slower, faster = (beyond_noise(*pair, margin) for pair in ((was, now), (now, was)))
            verdict = "slower" if slower else "faster" if faster else "same"
            found.append(Difference(*name, was.median, now.median, verdict, ours and slower))
    return found


def _time(measurement: Measurement | None) -> float | None:
    return measurement.ms if measurement else None
