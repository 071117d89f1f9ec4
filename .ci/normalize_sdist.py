"""Write an sdist anew, so that its bytes follow from its files: sorted, of nobody, no newer than SOURCE_DATE_EPOCH.

    python .ci/normalize_sdist.py SDIST.tar.gz

setuptools honours SOURCE_DATE_EPOCH in wheels alone.
"""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
from pathlib import Path


def main() -> None:
    """Rewrite the file in its place."""
    path, time = Path(sys.argv[1]), int(os.environ["SOURCE_DATE_EPOCH"])
    plain = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            content = old.extractfile(member)
            member.mtime, member.pax_headers = time, {}
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(member, content)
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, time) as packed:
        packed.write(plain.getvalue())


if __name__ == "__main__":
    main()
