"""Where tensors lie in the device's memory: what lives at one time lies apart, in as few bytes as first fit finds."""

from __future__ import annotations

from qcompile.backends.integer.memory import owners
from qcompile.backends.integer.program import Program

#: Offsets are multiples of this many bytes, as of what the driver allocates.
ALIGNMENT = 256


def place(program: Program) -> tuple[dict[str, int], int]:
    """Return the offset of each tensor, and the bytes of all: of one sample.

    With several samples everything is so many times as far from the start: a tensor's samples lie behind one another.

    Parameters
    ----------
    program : Program
    """
    owner = owners(program)
    ends = len(program.operations)
    born: dict[str, int] = {owner[port.tensor]: -1 for port in program.inputs}
    dies = dict(born)
    for time, operation in enumerate(program.operations):
        for name in operation.inputs:
            dies[owner[name]] = time
        born.setdefault(owner[operation.output], time)
        dies[owner[operation.output]] = max(time, dies.get(owner[operation.output], time))
    for port in program.outputs:
        dies[owner[port.tensor]] = ends
    offsets: dict[str, int] = {}
    sizes = {name: -(-program.tensors[name].nbytes // ALIGNMENT) * ALIGNMENT for name in born}
    for name in sorted(born, key=lambda name: (-sizes[name], born[name], name)):
        taken = sorted((offsets[other], offsets[other] + sizes[other]) for other in offsets
                       if born[other] <= dies[name] and born[name] <= dies[other])  # fmt: skip
        at = 0
        for start, end in taken:
            if at + sizes[name] <= start:
                break
            at = max(at, end)
        offsets[name] = at
    whole = max((offsets[name] + sizes[name] for name in offsets), default=0)
    return {name: offsets[owner[name]] for name in program.tensors if owner[name] in offsets}, whole
