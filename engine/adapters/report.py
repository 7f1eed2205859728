"""What `accelerate` did to a model: each site, what serves it now, and what was left alone and why."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

from tubelet.kernels import Engagement, engaged


@dataclass(frozen=True)
class Site:
    """A place in a model where an op is computed.

    op: what is computed there ("attention", "norm", ...). where: the name of the module, "" for the model itself. served_by: the ops of
    `tubelet.kernels` that compute it now, empty if it was left alone. reason: why it was left alone. servable: whether an op could serve it
    in another model of this class, so that `strict` takes it for a failure.
    """

    op: str
    where: str
    served_by: tuple[str, ...] = ()
    reason: str = ""
    servable: bool = False


@dataclass
class Report:
    """What `accelerate` did. Printed, a table with the numbers of layers drawn together; `restore()` undoes it."""

    model: str
    sites: list[Site]
    notes: list[str] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _before: dict = field(default_factory=engaged, repr=False)

    @property
    def served(self) -> list[Site]:
        """The sites that an op serves now."""
        return [site for site in self.sites if site.served_by]

    @property
    def left(self) -> list[Site]:
        """The sites that were left alone."""
        return [site for site in self.sites if not site.served_by]

    def restore(self) -> None:
        """Make the model what it was. A second call does nothing. Raises ValueError, and changes nothing, if hooks were added to what was
        swapped: remove these first.
        """
        for undo in self._undo:
            getattr(undo, "check", lambda: None)()
        while self._undo:
            self._undo.pop()()

    def engaged(self) -> dict[str, dict[str, Engagement]]:
        """op -> implementation -> Engagement: what ran in this process since `accelerate`, as `tubelet.kernels.engaged` counts it (of
        attention also inside graphs of torch.compile, of the other ops outside of them).
        """
        found = {}
        for op, runs in engaged().items():
            for name, now in runs.items():
                before = self._before.get(op, {}).get(name, Engagement())
                before = before if before.calls <= now.calls else Engagement()  # there was a `reset_engaged` since
                calls = now.calls - before.calls
                kernels = {kernel: n - before.kernels.get(kernel, 0) for kernel, n in now.kernels.items()}
                kernels = {kernel: n for kernel, n in kernels.items() if n > 0}
                if calls > 0 or kernels:
                    found.setdefault(op, {})[name] = Engagement(calls, deepcopy(now.passed_over), kernels)
        return found

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.served)} of {len(self.sites)} sites served"]
        lines += [f"  note: {note}" for note in self.notes]
        rows = {}
        for site in self.sites:
            row = site.op, re.sub(r"\.\d+(?=\.|$)", ".*", site.where) or "(model)", ", ".join(site.served_by), site.reason
            rows[row] = rows.get(row, 0) + 1
        shown = [("op", "where", "served by")]
        shown += [
            (op, where + (f" ({n})" if n > 1 else ""), served or f"left alone: {reason}") for (op, where, served, reason), n in rows.items()
        ]
        widths = [max(len(row[column]) for row in shown) for column in range(2)]
        return "\n".join(lines + ["  " + "  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2])) for row in shown])
