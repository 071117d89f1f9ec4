"""More data than the catalogue has: a package that is another one is refused, and no photograph counts twice."""

from __future__ import annotations

import hashlib
from pathlib import Path

import further_data
import pytest


def test_another_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(further_data.subprocess, "run", lambda words, **_: ran.append(words))
    (tmp_path / "pictures").mkdir()
    package = tmp_path / "pictures/pictures_1.0_all.deb"
    package.write_bytes(b"as it was looked through")
    sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
    assert further_data.unpack("pictures", sha256, tmp_path) == tmp_path / "pictures"
    assert [words[0] for words in ran] == ["dpkg-deb"]
    package.write_bytes(b"of another release")
    with pytest.raises(further_data.FetchError, match=r"pictures_1\.0_all\.deb is another file"):
        further_data.unpack("pictures", sha256, tmp_path)


def test_photographs_are_forty_and_each_is_named_once() -> None:
    names = [name for *_, found in further_data.PACKAGES for name in found.split()]
    assert len(names) == len(set(names)) == 40
