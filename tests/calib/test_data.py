import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.calib.data import Dataset, InputSpec, Sample, input_specs, open_data
from qcompile.core.errors import DataError

X = InputSpec("x", np.dtype(np.float32), (1, 3))
FREE = InputSpec("x", np.dtype(np.float32), (1, None))
IDS = InputSpec("ids", np.dtype(np.int64), (1, 2))


def ramp(count: int) -> np.ndarray:
    return np.arange(count * 3, dtype=np.float32).reshape(count, 1, 3)


def arrays(data: Dataset) -> list[list[float]]:
    return [feeds["x"].reshape(-1).tolist() for feeds in data]


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    def npz(name: str = "data.npz", compressed: bool = False, **content: np.ndarray) -> str:
        write = np.savez_compressed if compressed else np.savez
        write(tmp_path / name, **content)
        return str(tmp_path / name)

    return npz


def refused(source: str, fact: str, specs: tuple[InputSpec, ...] = (X,)) -> None:
    """Opening or reading the data fails with this fact."""
    with pytest.raises(DataError, match=fact) as caught:
        list(open_data(source, specs))
    assert "\n" not in str(caught.value) and caught.value.remedy


def test_input_specs_are_those_of_the_model(model_of: Callable[..., ir.Model]) -> None:
    model = model_of("(float[N,3] x, int64[2] i, float[3] w) => (float[N,3] y) { y = Add (x, w) }", w=np.ones(3, "f4"))
    assert input_specs(model) == (
        InputSpec("x", np.dtype(np.float32), (None, 3)),
        InputSpec("i", np.dtype(np.int64), (2,)),
    )
    assert str(input_specs(model)[0]) == "x float32[?,3]"


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_has_its_samples_along_axis_0(compressed: bool, npz: Callable[..., str]) -> None:
    data = open_data(npz(compressed=compressed, x=ramp(3)), (X,))
    assert len(data) == 3
    assert arrays(data) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert arrays(data) == arrays(data), "it can be read again"
    assert next(iter(data))["x"].shape == (1, 3)


def test_an_npz_with_several_inputs(npz: Callable[..., str]) -> None:
    ids = np.arange(4).reshape(2, 1, 2)
    samples = list(open_data(npz(ids=ids, x=ramp(2)), (X, IDS)))
    assert [sample["ids"].tolist() for sample in samples] == [[[0, 1]], [[2, 3]]]
    assert [sample["x"].tolist() for sample in samples] == [[[0, 1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize("name", ["input.1", "x:0", "encoder/x", "a.npy"])
def test_an_npz_keeps_the_name_of_an_input(name: str, npz: Callable[..., str]) -> None:
    spec = InputSpec(name, np.dtype(np.float32), (1, 3))
    assert [list(sample) for sample in open_data(npz(**{name: ramp(2)}), (spec,))] == [[name], [name]]


def test_a_folder_of_npz_with_varying_lengths(tmp_path: Path) -> None:
    for index, length in enumerate((2, 5, 1)):
        np.savez(tmp_path / f"{index:03}.npz", x=np.full((1, length), index, np.float32))
    data = open_data(str(tmp_path), (FREE,))
    assert arrays(data) == [[0] * 2, [1] * 5, [2]]


def test_a_folder_of_npy_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        np.save(tmp_path / f"{name}.npy", np.full((1, 3), ord(name), np.float32))
    (tmp_path / "README.txt").write_text("not a sample")
    assert arrays(open_data(str(tmp_path), (X,))) == [[97] * 3, [98] * 3, [99] * 3]


def test_onnx_test_data_sets(tmp_path: Path) -> None:
    for index in range(2):
        folder = tmp_path / f"test_data_set_{index}"
        folder.mkdir()
        x = onnx.numpy_helper.from_array(ramp(2)[index], "x")
        unnamed = onnx.numpy_helper.from_array(np.int64([[index, 7]]))
        (folder / "input_0.pb").write_bytes(x.SerializeToString())
        (folder / "input_1.pb").write_bytes(unnamed.SerializeToString())
        (folder / "output_0.pb").write_bytes(x.SerializeToString())
    samples = list(open_data(str(tmp_path), (X, IDS)))
    assert [sample["x"].tolist() for sample in samples] == ramp(2).tolist()
    assert [sample["ids"].tolist() for sample in samples] == [[[0, 7]], [[1, 7]]]


@pytest.mark.parametrize("module", ["feeds_for_tests", "package_for_tests.feeds"])
def test_a_function(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "import numpy\n\ndef samples():\n    for i in range(2):\n        yield {'x': numpy.float32([[i] * 3])}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = open_data(f"{module}:samples", (X,))
    assert arrays(data) == arrays(data) == [[0] * 3, [1] * 3]
    assert data.digest == open_data(f"{module}:samples", (X,)).digest


def test_split_holds_the_last_part_out(npz: Callable[..., str]) -> None:
    data = open_data(npz(x=ramp(10)), (X,))
    fit, held_out = data.split(0.2)
    assert (len(fit), len(held_out)) == (8, 2)
    assert arrays(fit) + arrays(held_out) == arrays(data)
    assert len({data.digest, fit.digest, held_out.digest}) == 3


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (8, (6, 2))])
def test_neither_part_of_a_split_is_empty(count: int, sizes: tuple[int, int], npz: Callable[..., str]) -> None:
    fit, held_out = open_data(npz(x=ramp(count)), (X,)).split(0.2)
    assert (len(fit), len(held_out)) == sizes


def test_a_single_sample_serves_as_both(npz: Callable[..., str]) -> None:
    fit, held_out = open_data(npz(x=ramp(1)), (X,)).split(0.2)
    assert arrays(fit) == arrays(held_out) == [[0, 1, 2]]


def test_a_part_can_be_split_again(npz: Callable[..., str]) -> None:
    data = open_data(npz(x=ramp(10)), (X,))
    _, last = data.split(0.4)
    first, second = last.split(0.5)
    assert arrays(first) == arrays(data)[6:8]
    assert arrays(second) == arrays(data)[8:]


def test_errors_count_samples_of_the_whole_set(npz: Callable[..., str]) -> None:
    x = ramp(10)
    data = open_data(npz(x=x), (X,))
    _, held_out = data.split(0.2)
    x[9, 0, 1] = np.nan
    npz(x=x)
    with pytest.raises(DataError, match="sample 9: 'x' holds NaN"):
        list(held_out)


def test_the_digest_depends_on_content_alone(npz: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for index, sample in enumerate(ramp(3)):
        np.save(tmp_path / "folder" / f"{index}.npy", sample)
    sources = [npz("a.npz", x=ramp(3)), npz("b.npz", compressed=True, x=ramp(3)), str(tmp_path / "folder")]
    digests = {open_data(source, (X,)).digest for source in sources}
    assert len(digests) == 1 and len(digests.pop()) == 64


def test_the_digest_sees_a_bit_a_label_and_the_order(npz: Callable[..., str]) -> None:
    changed = ramp(3)
    changed.view(np.uint32)[1, 0, 2] ^= 1
    contents = [
        {"x": ramp(3)},
        {"x": changed},
        {"x": ramp(3)[::-1].copy()},
        {"x": ramp(3), "labels": np.arange(3)},
        {"x": ramp(3), "labels": np.ones(3, np.int64)},
    ]
    digests = {open_data(npz(f"{i}.npz", **content), (X,)).digest for i, content in enumerate(contents)}
    assert len(digests) == len(contents)


def test_labels_come_beside_the_inputs(npz: Callable[..., str]) -> None:
    data = open_data(npz(x=ramp(3), labels=np.int64([4, 0, 2])), (X,))
    assert [label for _, label in data.labelled()] == [4, 0, 2]
    assert all(list(feeds) == ["x"] for feeds in data)
    _, held_out = data.split(0.3)
    assert [label for _, label in held_out.labelled()] == [2]


def test_without_labels_there_is_none(npz: Callable[..., str]) -> None:
    assert [label for _, label in open_data(npz(x=ramp(2)), (X,)).labelled()] == [None, None]


def test_an_input_that_is_called_labels_is_no_label(npz: Callable[..., str]) -> None:
    spec = InputSpec("labels", np.dtype(np.float32), (1, 3))
    samples = list(open_data(npz(labels=ramp(2)), (spec,)).labelled())
    assert [(feeds["labels"].shape, label) for feeds, label in samples] == [((1, 3), None)] * 2


def test_the_real_evaluation_data_have_labels(root: Path) -> None:
    spec = InputSpec("x", np.dtype(np.float32), (None, 32, 32, 3))
    labels = [label for _, label in open_data(str(root / "models" / "resnet8_eval.npz"), (spec,)).labelled()]
    assert len(labels) == 20 and set(labels) <= set(range(10))


def cut_off(path: Path, missing: int) -> None:
    """Rewrite an archive so that its one array lacks its last bytes, the archive itself being whole."""
    with zipfile.ZipFile(path) as archive:
        [name] = archive.namelist()
        content = archive.read(name)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content[:-missing])


def test_an_npz_is_read_as_a_stream(npz: Callable[..., str]) -> None:
    source = npz(x=ramp(4))
    cut_off(Path(source), 5)
    samples: Iterator[Sample] = iter(open_data(source, (X,)))
    assert [next(samples)["x"].tolist() for _ in range(3)] == ramp(3).tolist(), "what stands in front is read"
    with pytest.raises(DataError, match="array 'x' is cut off"):
        next(samples)


def test_a_cut_off_archive(npz: Callable[..., str]) -> None:
    source = npz(x=ramp(100))
    content = Path(source).read_bytes()
    Path(source).write_bytes(content[: len(content) // 2])
    refused(source, r"data\.npz: cannot be read as \.npz")


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("noise", [b"\x00", b"\xff", b"\x07"])
def test_a_damaged_compressed_array(noise: bytes, place: float, npz: Callable[..., str]) -> None:
    source = npz(compressed=True, x=np.random.default_rng(0).standard_normal((200, 1, 3)).astype(np.float32))
    content = bytearray(Path(source).read_bytes())
    start = int(len(content) * place)
    content[start : start + 40] = noise * 40
    Path(source).write_bytes(content)
    refused(source, r"data\.npz: (cannot be read as \.npz|sample \d+: 'x' holds NaN)")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 nor this"])
def test_a_file_that_is_no_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    refused(str(tmp_path / "data.npz"), r"data\.npz: cannot be read as \.npz")


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.txt", "hello, this is no array")
    refused(str(tmp_path / "data.npz"), r"data\.npz: cannot be read as \.npz")


def test_pickles_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.array([[{"a": 1}, 2, 3]], dtype=object))
    refused(str(path), "array 'x' holds Python objects")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "0.npy", np.array([[{"a": 1}, 2, 3]], dtype=object))
    refused(str(tmp_path / "folder"), r"0\.npy: cannot be read \(.*pickle")


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ({}, "holds no array"),
        ({"x": ramp(3)[:0]}, None),
        ({"x": np.float32(3.0)}, "array 'x' has no leading sample axis"),
        ({"x": np.asfortranarray(np.ones((4, 3), np.float32))}, "array 'x' has no leading sample axis in C order"),
        ({"x": ramp(3), "labels": np.arange(2)}, r"arrays differ in their number of samples \(x: 3, labels: 2\)"),
        ({"x": ramp(3).astype(np.float64)}, "sample 0: 'x' is float64, the model takes float32"),
        ({"x": ramp(3).astype(">f4")}, "sample 0: 'x' is >f4, the model takes float32"),
        ({"x": ramp(3)[:, 0]}, r"sample 0: 'x' has shape \[3\], the model takes x float32\[1,3\]"),
        ({"x": ramp(3).reshape(3, 3, 1)}, r"sample 0: 'x' has shape \[3, 1\]"),
        ({"y": ramp(3)}, r"sample 0: the model has no input 'y'; its inputs are x float32\[1,3\]"),
        ({"labels": np.arange(3)}, "sample 0: input 'x' is missing"),
        ({"x": ramp(3), "y": ramp(3)}, "sample 0: the model has no input 'y'"),
        ({"x": np.float32([[[0, 0, 0]], [[0, np.nan, 0]]])}, "sample 1: 'x' holds NaN"),
    ],
)
def test_arrays_that_do_not_fit(content: dict[str, np.ndarray], fact: str | None, npz: Callable[..., str]) -> None:
    source = npz(**content)
    if fact is not None:
        refused(source, fact)
    else:
        with pytest.raises(DataError, match="holds no sample"):
            len(open_data(source, (X,)))


def test_infinities_of_a_mask_are_data(npz: Callable[..., str]) -> None:
    x = np.float32([[[0, 0, 0]], [[0, -np.inf, 0]]])
    assert arrays(open_data(npz(x=x), (X,)))[1] == [0.0, -np.inf, 0.0]


def test_an_empty_sample(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((1, 0), np.float32))
    refused(str(tmp_path), r"sample 0: 'x' is empty \(shape \[1, 0\]\)", (FREE,))


def test_a_label_that_is_no_number(npz: Callable[..., str]) -> None:
    refused(npz(x=ramp(2), labels=np.array(["cat", "dog"])), "sample 0: .*label")
    refused(npz(x=ramp(2), labels=np.float32([0, np.nan])), "sample 1: .*label")
    refused(npz(x=ramp(2), labels=np.zeros((2, 0), np.int64)), "sample 0: .*label")


def test_one_array_for_several_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ramp(1)[0])
    refused(str(tmp_path), r"0\.npy: holds one array, the model has several inputs; use \.npz with x, ids", (X, IDS))


@pytest.mark.parametrize("name", ["0.npy", "0.npz"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
def test_a_sample_file_that_cannot_be_read(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(str(tmp_path), rf"{name}: cannot be read \(")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(str(tmp_path), r"holds no \.npz, \.npy or test_data_set_\*")


def test_a_test_data_set_without_input(tmp_path: Path) -> None:
    (tmp_path / "test_data_set_0").mkdir()
    refused(str(tmp_path), r"test_data_set_0/input_0\.pb: cannot be read as an ONNX tensor")
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    refused(str(tmp_path), r"test_data_set_0/input_0\.pb: cannot be read as an ONNX tensor")


@pytest.mark.parametrize("name", ["data.csv", "data.npy", "data"])
def test_a_file_of_another_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("1,2,3")
    refused(str(tmp_path / name), "not data that can be read; give an .npz, a folder of samples, or module:function")


@pytest.mark.parametrize("source", ["absent.npz", "absent/folder", "absent", ":", "json:", ":load", "C:\\data.npz"])
def test_nothing_there(source: str) -> None:
    refused(source, "no such file or folder")


@pytest.mark.parametrize("source", ["no_such_module_at_all:samples", "json:no_such_function"])
def test_a_function_that_is_not_there(source: str) -> None:
    refused(source, f"{source}: cannot be imported")


def yields_a_list() -> Iterator[list[int]]:
    yield [1, 2, 3]


def returns_nothing() -> None:
    return None


def breaks_down() -> Iterator[Sample]:
    raise RuntimeError("the disk is full")
    yield {}


@pytest.mark.parametrize(
    ("function", "fact"), [(yields_a_list, "list"), (returns_nothing, "None"), (breaks_down, "the disk is full")]
)
def test_a_function_that_does_not_yield_feeds(
    function: Callable[[], object], fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = type(sys)("feeds_that_fail")
    module.samples = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "feeds_that_fail", module)
    refused("feeds_that_fail:samples", f"^feeds_that_fail:samples: .*{fact}")
