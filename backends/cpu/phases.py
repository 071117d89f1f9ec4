"""The steps of a run: what threads do at one time, and where they wait for one another."""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.backends.cpu.network import Call

#: Kernels of which one operation may need several, each for channels of its own.
BY_CHANNELS = ("linear", "depthwise")


def phases(calls: Sequence[Call]) -> list[list[Call]]:
    """Return calls in groups: within one, no thread waits for another.

    One group is calls that one thread does; or calls that all threads share and that write channels of their own, with
    what one of them can do at the same time in front of them.
    """
    found: list[list[Call]] = []
    for call in calls:
        if found and _together(found[-1], call):
            found[-1].append(call)
        elif call.shared and found and (margins := _apart(found[-1], call)):
            found[-1] = found[-1][: -len(margins)]
            found = [*filter(None, found), [*margins, call]]
        else:
            found.append([call])
    return found


def _apart(group: Sequence[Call], behind: Call) -> list[Call]:
    """Return the calls at the end of a group that may run at one time with what is behind it: its own margins."""
    own = [call.apart and call.operation == behind.operation for call in reversed(group)]
    count = own.index(False) if False in own else len(own)
    return list(group[len(group) - count :])


def _together(group: Sequence[Call], call: Call) -> bool:
    last = group[-1]
    if not call.shared:
        return not any(each.shared for each in group)
    kernels = [each.kernel.split("_")[0] for each in (last, call)]
    return last.shared > 0 and last.operation == call.operation and kernels[0] == kernels[1] in BY_CHANNELS
