"""The tree keeps the shape that docs/architecture.md gives it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Every part may import itself and those in front of it.
ORDER = ("core", "calib", "passes", "backends", "roof")
FOLDERS = {"core": "qcompile/core", "calib": "calib", "passes": "passes", "backends": "backends"}
LINKED = ("backends", "calib", "passes")

LONGEST_FILE = 400
LONGEST_FUNCTION = 40


def files_of(part: str) -> list[Path]:
    if part == "roof":
        return sorted((ROOT / "qcompile").glob("*.py"))
    return sorted((ROOT / FOLDERS[part]).rglob("*.py"))


SOURCES = [(part, path) for part in ORDER for path in files_of(part)]
EVERY_SOURCE = pytest.mark.parametrize(("part", "path"), SOURCES, ids=[str(p.relative_to(ROOT)) for _, p in SOURCES])


def module_of(part: str, path: Path) -> str:
    """Return the name under which a file is imported."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    parts = inside if part in ("core", "roof") else ("qcompile", *inside)
    return ".".join(parts).removesuffix(".__init__")


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield every module that a file imports, also inside functions, and what it imports from a package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(part: str, path: Path) -> list[str]:
    module = module_of(part, path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return list(imported(ast.parse(path.read_text(encoding="utf-8")), package))


def part_of(module: str) -> str | None:
    """Return the part that a module of qcompile belongs to; None for foreign ones."""
    names = module.split(".")
    if names[0] != "qcompile":
        return None
    return names[1] if len(names) > 1 and names[1] in FOLDERS else "roof"


def test_the_parser_of_imports_sees_all_forms() -> None:
    text = """
import a.b
from c import d
from . import e
from ..f import g
def h():
    import i
    from qcompile.backends import j
"""
    assert list(imported(ast.parse(text), "p.q")) == ["a.b", "c.d", "p.q.e", "p.f.g", "i", "qcompile.backends.j"]
    assert part_of("qcompile.backends.j") == "backends" and part_of("qcompile.driver.compile") == "roof"
    assert part_of("qcompile") == "roof" and part_of("numpy") is None


@EVERY_SOURCE
def test_imports_flow_one_way(part: str, path: Path) -> None:
    allowed = ORDER[: ORDER.index(part) + 1]
    against = [module for module in imports_of(part, path) if part_of(module) not in (None, *allowed)]
    assert against == []


@EVERY_SOURCE
def test_onnxruntime_is_imported_in_one_place_and_torch_in_none(part: str, path: Path) -> None:
    roots = {module.split(".")[0] for module in imports_of(part, path)}
    assert "torch" not in roots
    # A bundle's runner, and what runs segments, are on their own on a device, where there is no qcompile.
    alone = [ROOT / name for name in ("qcompile/runner.py", "backends/cpu/segmented_session.py")]
    assert "onnxruntime" not in roots or path in (ROOT / "qcompile/core/runtime.py", *alone)
    assert not roots & {"passes", "backends", "calib"}, "the folders' bare names are no packages"


def test_something_was_looked_at() -> None:
    assert {part for part, _ in SOURCES} == set(ORDER)
    assert "onnxruntime" in imports_of("core", ROOT / "qcompile" / "core" / "runtime.py")


def test_torch_is_imported_for_exports_alone() -> None:
    for folder in ("tests", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            modules = imported(ast.parse(path.read_text(encoding="utf-8")), "")
            assert "torch" not in {module.split(".")[0] for module in modules}, path


def test_importing_qcompile_imports_no_backend() -> None:
    program = "import sys, qcompile; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "qcompile" in loaded
    assert not loaded & {"onnxruntime", "tvm", "torch", "tensorrt"}


def setuptools_table() -> dict[str, object]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table: dict[str, object] = tomllib.loads(text)["tool"]["setuptools"]
    return table


def test_packages_are_the_folders_that_hold_python_files() -> None:
    found = {module_of(part, path.parent / "__init__.py"): str(path.parent.relative_to(ROOT)) for part, path in SOURCES}
    assert sorted(setuptools_table()["packages"]) == sorted(found)  # type: ignore[call-overload]
    assert setuptools_table()["package-dir"] == found


def test_every_package_says_what_it_is() -> None:
    for folder in setuptools_table()["package-dir"].values():  # type: ignore[attr-defined]
        tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), folder


def test_package_data_exist() -> None:
    directories = setuptools_table()["package-dir"]
    for package, patterns in setuptools_table()["package-data"].items():  # type: ignore[attr-defined]
        for pattern in patterns:
            assert list((ROOT / directories[package]).glob(pattern)), (package, pattern)  # type: ignore[index]


@pytest.mark.parametrize("name", LINKED)
def test_links_show_the_tree_to_type_checkers(name: str) -> None:
    link = ROOT / "qcompile" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name), "relative, so that it holds in every clone"
    assert link.resolve() == ROOT / name


@EVERY_SOURCE
def test_files_and_functions_are_short(part: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: length(node) for node in functions if length(node) > LONGEST_FUNCTION}
    assert long == {}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines from the first statement behind the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return 0 if not body else (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_the_length_of_a_function_leaves_its_docstring_out() -> None:
    tree = ast.parse('def f(a,\n      b):\n    """One.\n\n    Two.\n    """\n    x = (a,\n         b)\n    return x\n')
    [function] = tree.body
    assert isinstance(function, ast.FunctionDef) and length(function) == 3


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert [path for _, path in SOURCES if path.stem in empty] == []
