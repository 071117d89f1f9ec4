"""What is installed, built and released: pinned, listed, the same bytes twice (.ci/check_packaging does it whole)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CI = ROOT / ".ci"
LOCK = (CI / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: What README's command for the tests had installed before there was a lock.
LOCKED = ("cpu", "cuda-tvm", "dev")


def pins() -> dict[str, set[str]]:
    """Return the versions of each package in the lock; some have one per version of Python."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==([^ ;]+)", LOCK, re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("extra", ["", *LOCKED])
def test_the_lock_has_what_pyproject_asks_for(extra: str) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(requirements.Requirement, lines):
        name = requirement.name.lower().replace("_", "-")
        if name != "qcompile":
            versions = pins()[name]
            assert all(version in requirement.specifier for version in versions), "bash .ci/lock"


def test_everything_in_the_lock_has_a_hash_and_nothing_says_where_it_is() -> None:
    entries = re.split(r"\n(?=[a-z0-9])", LOCK)[1:]
    assert len(entries) == sum(map(len, pins().values())) > 60
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in LOCK and set(re.findall(r"--[a-z-]+", LOCK)) == {"--hash"}


def test_licences_of_all_that_is_locked_are_listed() -> None:
    page = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| ([\w.-]+) \| ([\w.]+) \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE))
    listed = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in listed.items()}
    for name, versions in pins().items():
        if name != "colorama":  # which Windows alone has
            assert listed[name] in versions, f"{name}: python .ci/licences.py"
    assert "| Chart.js | 4." in page
    # Of exporting models alone, a package without content.
    assert set(re.findall(r"^\| ([\w.-]+) \|.*not stated", page, re.MULTILINE)) <= {"cuda-toolkit"}


def sdist(path: Path, files: dict[str, bytes], time: int, owner: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            source = path.with_name("member")
            source.write_bytes(content)
            member = archive.gettarinfo(source, name)
            member.mtime, member.uname, member.uid = time, owner, len(owner)
            with source.open("rb") as file:
                archive.addfile(member, file)
    return path


def test_an_sdist_does_not_tell_who_made_it_when(tmp_path: Path) -> None:
    files = {"q-1/b.py": b"b = 1\n", "q-1/a.py": b"", "q-1/" + "deep/" * 40 + "c.py": b"c" * 10_000}
    one = sdist(tmp_path / "one.tar.gz", files, 1_700_000_000, "someone")
    two = sdist(tmp_path / "two.tar.gz", dict(reversed(files.items())), 1_600_000_123, "else")
    assert one.read_bytes() != two.read_bytes()
    for path in (one, two):
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1500000000"}
        subprocess.run([sys.executable, CI / "normalize_sdist.py", path], check=True, env=environment)
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as archive:
        assert {member.name: archive.extractfile(member).read() for member in archive} == files  # type: ignore[union-attr]
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(1_500_000_000, 0, "")}


@pytest.mark.skipif(importlib.util.find_spec("cyclonedx") is None, reason="needs cyclonedx-python-lib")
def test_the_bill_of_materials_names_what_runs(tmp_path: Path) -> None:
    wheel = tmp_path / "qcompile.whl"
    wheel.write_bytes(b"a wheel")
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1500000000"}
    outputs = [tmp_path / "one.json", tmp_path / "two.json"]
    for output in outputs:
        subprocess.run([sys.executable, CI / "sbom.py", wheel, output], check=True, env=environment)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    bill = json.loads(outputs[0].read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["timestamp"].startswith("2017-07-14")
    named = {entry["name"]: entry for entry in bill["components"]}
    direct = {re.split(r"[<>=]", line)[0].replace("_", "-") for line in PROJECT["dependencies"]}
    assert {*direct, "onnxruntime", "apache-tvm", "chart.js", "protobuf"} <= set(named)
    assert not {"pytest", "mypy", "torch"} & set(named)
    assert all(entry["licenses"] for entry in named.values())
    edges = {entry["ref"]: entry.get("dependsOn", []) for entry in bill["dependencies"]}
    assert {
        ref.partition("@")[0].rpartition("/")[2] for ref in edges[bill["metadata"]["component"]["bom-ref"]]
    } >= direct
