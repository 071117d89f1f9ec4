"""Write the bill of materials of a wheel (CycloneDX 1.6, JSON): what it carries, and what is installed beside it.

    python .ci/sbom.py WHEEL OUT.cdx.json

Versions are those that are installed here, of what qcompile requires with the extras that people compile with. The same
wheel and versions give the same bytes: SOURCE_DATE_EPOCH is the time, and the serial number follows from the content.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import sys
import uuid
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from dependencies import bundled, installed, project, reached
from packageurl import PackageURL

#: Those of tests, measurements and model exports are no part of what runs.
EXTRAS = ("cpu", "cuda-tvm", "cluster")


def component(name: str, version: str, licence: str, kind: str) -> Component:
    """Return one entry; `kind` is the type of its package URL."""
    known = [] if licence == "not stated" else [LicenseFactory().make_from_string(licence)]
    url = PackageURL(kind, None, name, version)
    return Component(name=name, version=version, licenses=known, purl=url, bom_ref=str(url), type=ComponentType.LIBRARY)


def bill(wheel: Path) -> Bom:
    """Return the bill of materials of one wheel."""
    packages, table = installed(), project()
    needs = reached(packages, EXTRAS)
    own = component("qcompile", table["version"], table["license"], "pypi")
    own.type = ComponentType.APPLICATION
    own.hashes.add(HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(wheel.read_bytes()).hexdigest()))
    entries = {
        name: component(name, packages[name].version, packages[name].licence, "pypi")
        for name in needs
        if name != "qcompile"
    }
    carried = [component(name.lower(), version, licence, "npm") for name, version, licence in bundled()]
    bom = Bom(components=[*entries.values(), *carried])
    bom.metadata.component = own
    bom.metadata.timestamp = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.UTC)
    bom.register_dependency(own, [*(entries[name] for name in sorted(needs["qcompile"])), *carried])
    for name, entry in sorted(entries.items()):
        bom.register_dependency(entry, [entries[each] for each in sorted(needs[name])])
    told = "\n".join(sorted(f"{each.purl} {[str(known) for known in each.licenses]}" for each in bom.components))
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, f"{own.purl}\n{own.hashes}\n{told}")
    return bom


def main() -> None:
    """Write it."""
    wheel, output = map(Path, sys.argv[1:])
    output.write_text(JsonV1Dot6(bill(wheel)).output_as_string(indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
