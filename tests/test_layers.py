from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import hoptim

PACKAGE = Path(hoptim.__file__).parent
# A room imports from the rooms in the lines above its own, and from itself. Each line is a floor.
FLOORS = [
    {"checks", "config"},
    {"linalg", "data"},
    {"solvers", "problem"},
    {"curvature"},
    {"methods"},
    {"training"},
    {"diagnostics", "tracking", "recipes"},
]
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    """The modules of hoptim that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            known = {name for name in submodules if name.removeprefix("hoptim.") in FILES}
            found |= known or {base}
    return {name.removeprefix("hoptim").lstrip(".") for name in found if name.split(".")[0] == "hoptim"}


def room(module: str) -> str:
    """The folder that a module is in, or a file that stands beside the folders."""
    return module.split(".")[0]


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_a_room_imports_only_from_rooms_below_it(name: str) -> None:
    floors = [number for number, floor in enumerate(FLOORS) if room(name) in floor]
    assert floors, "a new room needs its place in FLOORS"
    below = set().union(*FLOORS[: floors[0]]) | {room(name)}
    assert {room(found) for found in imports(FILES[name])} <= below


def test_linalg_imports_torch_and_nothing_else() -> None:
    for name, path in FILES.items():
        if room(name) == "linalg":
            assert {room(found) for found in imports(path)} <= {"linalg"}


def test_public_names_come_from_where_type_checkers_see_them() -> None:
    (block,) = (node for node in ast.parse(FILES["__init__"].read_text()).body if isinstance(node, ast.If))
    declared = {alias.asname: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    files = {name: f"hoptim.{file}" for name, file in hoptim._FILES.items()}
    assert declared == {"recipes": "hoptim", **files}
    assert sorted(hoptim.__all__) == sorted(declared)
    for name, file in files.items():
        assert getattr(hoptim, name) is getattr(importlib.import_module(file), name), name
        assert name in dir(hoptim)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hoptim' has no attribute 'Nothing'"):
        hoptim.Nothing  # noqa: B018


def output_of(code: str) -> str:
    """What a new process prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout.strip()


def test_a_name_is_imported_when_it_is_first_used() -> None:
    assert output_of("import sys, hoptim; print('torch' in sys.modules, hasattr(hoptim.recipes, 'Gate'))") == "False True"
    code = "import sys; from hoptim import CG; print('hoptim.training' in sys.modules, CG().terms)"
    assert output_of(code) == "False 20"
    assert (
        output_of("from hoptim import *; print(CG().terms, recipes.__name__, audit.__name__)") == "20 hoptim.recipes audit"
    )


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name].name == "__init__.py"])
def test_no_name_is_both_a_module_and_something_else(name: str) -> None:
    package = importlib.import_module("hoptim." + name if name != "__init__" else "hoptim")
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        found = getattr(package, info.name.rpartition(".")[2], None)
        assert found is None or isinstance(found, types.ModuleType), info.name


def test_import_is_light() -> None:
    heavy = ("wandb", "mlflow", "tensorboard", "matplotlib", "hydra", "rich", "sklearn")
    code = f"import sys, hoptim.tracking; from hoptim import *; print([m for m in {heavy} if m in sys.modules])"
    assert output_of(code) == "[]"
