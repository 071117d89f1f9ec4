"""The Pareto front: written beside the artifact or from a calibration, each point a plan that compiles."""

from __future__ import annotations

import json
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from qcompile.allocation import Widths
from qcompile.pareto import undominated
from qcompile.picture import Picture

ROOT = Path(__file__).parents[2]


def front_of(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "front.json").read_text())
    jsonschema.validate(content, json.loads((ROOT / "docs/schemas/front.schema.json").read_text()))
    return content


@pytest.fixture
def compiled(qcompile, resnet8, tmp_path) -> Path:
    """The model of the repository, compiled with its front."""
    model, calibration, evaluation = resnet8
    words = (
        "--target",
        "cpu",
        "--data",
        calibration,
        "--eval",
        evaluation,
        "--smoothing",
        "none",
        "--rotation",
        "none",
    )
    done = qcompile(model, *words, "--pareto", "-o", tmp_path / "whole", "--cache", tmp_path / "cache")
    assert done.code == 0, done.err
    assert "best bits for every size" in done.out and "plan-01.json" in done.out
    assert qcompile(model, *words, "-o", tmp_path / "plain", "--cache", tmp_path / "cache", "-q").code == 0
    return tmp_path / "whole"


def test_the_front_beside_an_artifact(qcompile, resnet8, compiled, tmp_path):
    content = front_of(compiled / "pareto")
    points = content["points"]
    assert len(points) >= 4
    for smaller, larger in pairwise(points):
        assert smaller["bytes"] < larger["bytes"] and smaller["sqnr"] < larger["sqnr"]
    assert all(point["gap"] < 1e-6 for point in points)
    for uniform in content["uniform"].values():
        beaten = [point for point in points if point["bytes"] <= uniform["bytes"]]
        assert max(point["sqnr"] for point in beaten) >= uniform["sqnr"]
    # What is compiled is what is compiled without it, and the manifest lists what is more.
    assert content["chosen"] == content["uniform"]["8"]
    for name in ("model.onnx", "plan.json", "report.json"):
        assert (compiled / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    listed = set(json.loads((compiled / "manifest.json").read_text())["files"])
    names = {"pareto/front.json", "pareto/front.svg", "pareto/front.png"} | {f"pareto/{p['plan']}" for p in points}
    assert {name for name in listed if name.startswith("pareto/")} == names
    texts = {(compiled / "pareto" / point["plan"]).read_text() for point in points}
    assert len(texts) == len(points)
    # A plan between the ends compiles: to its bits, and to the size that was expected.
    point = points[len(points) // 2]
    assert 0 < point["in_four_bits"] < point["weights"]
    plan, output = compiled / "pareto" / point["plan"], tmp_path / "applied"
    done = qcompile("apply", resnet8[0], "--plan", plan, "--data", resnet8[1], "--eval", resnet8[2], "-o", output)
    assert done.code == 0, done.err
    report = json.loads((output / "report.json").read_text())
    assert report["size"]["artifact_bytes"] == pytest.approx(point["bytes"], rel=0.005)
    tensors = [json.loads(path.read_text())["tensors"] for path in (plan, output / "plan.json")]
    packed = [{name for name, quant in of.items() if quant["block_size"]} for of in tensors]
    assert packed[0] == packed[1] and len(packed[0]) == point["in_four_bits"]


def test_an_artifact_with_a_front_gives_way_to_another(qcompile, resnet8, compiled):
    words = ("--target", "cpu", "--data", resnet8[1], "--smoothing", "none", "--rotation", "none", "-o", compiled)
    assert qcompile(resnet8[0], *words).code == 0
    assert not (compiled / "pareto").exists()


def test_the_pictures_can_be_read(compiled):
    tree = ElementTree.fromstring((compiled / "pareto/front.svg").read_text())
    texts = {element.text for element in tree.iter() if element.tag.endswith("text")}
    assert {"resnet8", "chosen", "all in 8 bits", "all in 4 bits"} <= texts
    circles = sum(element.tag.endswith("circle") for element in tree.iter())
    assert circles == len(front_of(compiled / "pareto")["points"]) + 3
    pixels = decoded((compiled / "pareto/front.png").read_bytes())
    assert pixels.shape == (840, 1280, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) >= 4


def decoded(content: bytes) -> np.ndarray:
    """Read a PNG of eight bits a colour whose rows have no filter, and hold its checksums."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind], at = body, at + 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_a_picture_is_where_it_is_drawn():
    picture = Picture(20, 10)
    picture.line((2, 5), (18, 5), "#ff0000")
    picture.dot((4, 5), 2, "#0000ff")
    picture.words((10, 9), "1é", "middle", "#00ff00")
    picture.words((19, 2), "outside")
    pixels = decoded(picture.png())
    assert tuple(pixels[10, 8]) == (0, 0, 255) and tuple(pixels[10, 30]) == (255, 0, 0)
    green = np.argwhere((pixels == (0, 255, 0)).all(axis=2))
    assert green[:, 0].min() >= 4 and green[:, 0].max() < 18 and 8 <= green[:, 1].min() < green[:, 1].max() <= 32


def test_the_front_of_a_calibration(qcompile, resnet8, tmp_path):
    model, calibration, _ = resnet8
    measured, folder, plan = tmp_path / "calibration.npz", tmp_path / "front", tmp_path / "plan.json"
    words = ("--target", "cpu", "--data", calibration, "--smoothing", "none", "--rotation", "none")
    assert qcompile("calibrate", model, *words, "--weights", "mixed", "-o", measured, "-q").code == 0
    planning = ("plan", model, "--calibration", measured, "--pareto", folder, "-o", plan)
    done = qcompile(*planning, "--max-size", "0.23x", "--json")
    assert done.code == 0, done.err
    content = front_of(folder)
    assert json.loads(done.out)["front"] == content
    assert content["chosen"]["size"] <= 0.23 and 0 < content["chosen"]["in_four_bits"] < content["chosen"]["weights"]
    manifest = json.loads((folder / "manifest.json").read_text())
    jsonschema.validate(manifest, json.loads((ROOT / "docs/schemas/manifest.schema.json").read_text()))
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    # Again, over its own: the same; beside what is another's: nothing is written.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = qcompile(*planning, "--max-size", "0.23x")
    assert again.code == 0 and "best bits for every size" in again.out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "mine.txt").write_text("mine")
    plan.unlink()
    refused = qcompile(*planning)
    assert refused.code == 2 and "which qcompile did not write" in refused.err and not plan.exists()


def test_a_calibration_without_losses_is_refused(qcompile, resnet8, tmp_path):
    measured = tmp_path / "calibration.npz"
    words = ("--target", "cpu", "--data", resnet8[1], "--smoothing", "none", "--rotation", "none", "-o", measured)
    assert qcompile("calibrate", resnet8[0], *words, "-q").code == 0
    planning = ("--calibration", measured, "--pareto", tmp_path / "front", "-o", tmp_path / "plan.json")
    done = qcompile("plan", resnet8[0], *planning)
    assert done.code == 2 and "--weights mixed" in done.err
    assert not (tmp_path / "front").exists() and not (tmp_path / "plan.json").exists()


def test_what_has_no_front(qcompile, small, tmp_path):
    def refused(fact: str, *words: object) -> None:
        done = qcompile(*words, "--target", "cpu", "--pareto", "-o", tmp_path / "out")
        assert done.code == 2 and fact in done.err and len(done.err.splitlines()) == 1, done.err
        assert not (tmp_path / "out").exists()

    assert qcompile(small.model, "--target", "cpu", "--data", small.data, "-o", tmp_path / "first", "-q").code == 0
    refused("came in quantized", tmp_path / "first/model.onnx", "--data", small.data)
    refused("takes data", small.model)
    refused("leaves nothing to choose", small.model, "--data", small.data, "--weights", "none")


def test_a_model_without_weights_to_choose_for_has_a_front_of_one_point(qcompile, small, tmp_path):
    words = ("--target", "cpu", "--data", small.data, "--pareto", "-o", tmp_path / "out")
    assert qcompile(small.model, *words).code == 0
    content = front_of(tmp_path / "out/pareto")
    assert [point["weights"] for point in content["points"]] == [0]


def test_what_is_larger_and_loses_more_is_no_point_of_the_front():
    found = [Widths(noise=noise, bytes=size) for noise, size in ((4.0, 1), (3.0, 3), (3.0, 2), (3.5, 2), (2.0, 9))]
    assert [(one.noise, one.bytes) for one in undominated(found[::-1])] == [(4.0, 1), (3.0, 2), (2.0, 9)]
