"""Run compiled C on an emulated microcontroller and count its instructions, exactly: QEMU, semihosting, a TCG plugin.

Instructions are not cycles: QEMU knows no pipeline, no cache and no flash wait states.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from qcompile.core.errors import TargetError, VerificationError


@dataclass(frozen=True)
class Machine:
    """An emulated board.

    Parameters
    ----------
    name : str
        QEMU's name of it.
    flags : tuple of str
        What the compiler is told of its processor.
    flash_bytes, ram_bytes : int
    libraries : tuple of str
        What the linker is given behind the objects.
    """

    name: str
    flags: tuple[str, ...]
    flash_bytes: int = 4 << 20
    ram_bytes: int = 4 << 20
    libraries: tuple[str, ...] = ()


#: By processor. No board of QEMU's has a Cortex-M0+: the M3 runs its code, which is a subset.
MACHINES = {
    "cortex-m0plus": Machine("mps2-an385", ("-mcpu=cortex-m0plus", "-mthumb")),
    "cortex-m4": Machine("mps2-an386", ("-mcpu=cortex-m4", "-mthumb")),
    "cortex-m7": Machine("mps2-an500", ("-mcpu=cortex-m7", "-mthumb")),
    "cortex-m55": Machine(
        "mps3-an547", ("-mcpu=cortex-m55", "-mthumb", "-mfloat-abi=hard"), flash_bytes=512 << 10, ram_bytes=512 << 10
    ),
}
GCC = "arm-none-eabi-gcc"
PACKAGES = "gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm"


@dataclass(frozen=True)
class Run:
    """What an emulated program did.

    Parameters
    ----------
    status : int
        What its main returned.
    files : mapping of str to bytes
        What it wrote.
    instructions : mapping of str to int
        Executed, by function.
    text_bytes : mapping of str to int
        Size in flash by symbol, constants included.
    """

    status: int
    files: Mapping[str, bytes]
    instructions: Mapping[str, int]
    text_bytes: Mapping[str, int]


def missing() -> str:
    """Return the programs that emulation needs and this machine lacks, empty if none."""
    wanted = (GCC, "qemu-system-arm", "gcc")
    return ", ".join(program for program in wanted if shutil.which(program) is None)


def emulate(
    sources: Sequence[Path],
    processor: str | Machine,
    given: Mapping[str, bytes],
    compiler: Sequence[str] = (),
    timeout: float = 300.0,
    include: Path | None = None,
) -> Run:
    """Compile a program for a microcontroller and run it.

    Parameters
    ----------
    sources : sequence of Path
        C files, one with a main; they may include ``semihosting.h``.
    processor : str or Machine
        One of `MACHINES`, or another one.
    given : mapping of str to bytes
        Files that the program finds.
    compiler : sequence of str
        With what it must be told of the processor; without it GCC.
    timeout : float
        Seconds.
    include : Path, optional
        Where the sources' headers lie, if not beside them.

    Raises
    ------
    TargetError
        If the tools are not there, or the program does not fit the machine.
    VerificationError
        If it does not end.
    """
    if absent := missing():
        raise TargetError("emulate", f"needs {absent}", f"apt-get install {PACKAGES}")
    with tempfile.TemporaryDirectory() as name, as_file(files("qcompile.backends.mcu") / "emulation") as here:
        folder = Path(name)
        machine = MACHINES[processor] if isinstance(processor, str) else processor
        headers = [] if include is None else [f"-I{include.absolute()}"]
        program = _linked(sources, machine, [*(compiler or (GCC, *machine.flags)), *headers], here, folder)
        plugin = counter(folder)
        for file, content in given.items():
            (folder / file).write_bytes(content)
        before = set(folder.iterdir())
        status = _executed(program, machine, plugin, folder, timeout)
        counts = counted(folder / "counts.tsv")
        written = {path.name: path.read_bytes() for path in set(folder.iterdir()) - before if path.name != "counts.tsv"}
        return Run(status, written, counts, _sizes(program))


def counter(folder: Path) -> Path:
    """Compile QEMU's plugin that counts instructions into a folder; its argument ``out`` is where it writes them.

    Raises
    ------
    TargetError
        If there is no compiler.
    """
    if shutil.which("gcc") is None:
        raise TargetError("count instructions", "needs gcc", "apt-get install gcc libc6-dev")
    plugin = folder / "count.so"
    with as_file(files("qcompile.backends.mcu") / "emulation") as here:
        _call(["gcc", "-O2", "-shared", "-fPIC", str(here / "count_instructions.c"), "-o", str(plugin)])
    return plugin


def counted(file: Path) -> dict[str, int]:
    """Return executed instructions by function, as the plugin wrote them."""
    rows = (line.rsplit("\t", 1) for line in file.read_text().splitlines())
    return {name: int(count) for name, count in rows}


def _linked(sources: Sequence[Path], machine: Machine, compiler: Sequence[str], here: Path, folder: Path) -> Path:
    program = folder / "program.elf"
    limits = [f"-Wl,--defsym={key}={size}" for key, size in
              (("flash_bytes", machine.flash_bytes), ("ram_bytes", machine.ram_bytes))]  # fmt: skip
    flags = ["-std=c99", "-O2", "-ffunction-sections", "-fdata-sections", f"-I{here}"]
    objects = []
    for source in (*sources, here / "startup.c"):
        objects.append(folder / f"{source.stem}.o")
        _call([*compiler, *flags, "-c", str(source), "-o", str(objects[-1])])
    # GCC links what clang compiles as well: it knows where its C library is.
    link = ["-Wl,--gc-sections", "-nostartfiles", "-T", str(here / "machine.ld"), *limits]
    _call([GCC, *machine.flags, *map(str, objects), *link, *machine.libraries, "-o", str(program)])
    return program


def _executed(program: Path, machine: Machine, plugin: Path, folder: Path, timeout: float) -> int:
    command = [
        "qemu-system-arm", "-M", machine.name, "-nographic", "-monitor", "none", "-serial", "none",
        "-semihosting-config", "enable=on,target=native", "-icount", "shift=6,sleep=off",
        "-plugin", f"{plugin},out=counts.tsv", "-kernel", str(program),
    ]  # fmt: skip
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        fact = f"has not ended after {timeout:.0f} s"
        raise VerificationError(f"emulated {machine.name}", fact, "report it with the model") from None


def _sizes(program: Path) -> dict[str, int]:
    """Return the bytes of each symbol in flash."""
    listed = _call(["arm-none-eabi-nm", "--print-size", str(program)])
    rows = [line.split() for line in listed.splitlines()]
    return {row[3]: int(row[1], 16) for row in rows if len(row) == 4 and row[2] in "tTrR"}


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if "error: " in line or "overflow" in line or "undefined" in line
        ] or [done.stderr]
        raise TargetError(Path(command[0]).name, lines[0], "see docs/targets/mcu.md")
    return done.stdout
