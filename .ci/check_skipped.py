"""Fail where tests were skipped for something that could have been installed: `check_skipped.py PYTEST_LOG`.

Programs can be installed, so no test may skip for one. What a processor cannot execute cannot be: tests of such
instructions may skip, where the processor is indeed without them.
"""

import re
import sys
from pathlib import Path

log = Path(sys.argv[1]).read_text()
flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
unfit, others = 0, []
for line in re.findall("^SKIPPED.*$", log, re.MULTILINE):
    lacking = re.fullmatch(r"SKIPPED \[(\d+)\] .*: the processor has no (\w+)", line)
    if lacking and lacking[2] not in flags:
        unfit += int(lacking[1])
    else:
        others.append(line)
if others:
    sys.exit("\n".join(["tests were skipped", *others]))
counted = re.search(r"(\d+) skipped", log.splitlines()[-1])
if unfit != (int(counted[1]) if counted else 0):
    sys.exit(f"tests were skipped: {log.splitlines()[-1]}, of which {unfit} for the processor")
if unfit:
    print(f"{unfit} tests were skipped: this processor lacks the instructions that they run")
