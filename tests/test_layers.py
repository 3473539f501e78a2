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


def test_public_names_are_those_that_are_imported() -> None:
    found = [node for node in ast.parse(FILES["__init__"].read_text()).body if isinstance(node, ast.ImportFrom)]
    assert set(hoptim.__all__) == {alias.name for node in found for alias in node.names}


def output_of(code: str) -> str:
    """What a new process prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout.strip()


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name].name == "__init__.py"])
def test_no_name_is_both_a_module_and_something_else(name: str) -> None:
    package = importlib.import_module("hoptim." + name if name != "__init__" else "hoptim")
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        found = getattr(package, info.name.rpartition(".")[2], None)
        assert found is None or isinstance(found, types.ModuleType), info.name


def test_import_is_light() -> None:
    heavy = ("wandb", "mlflow", "tensorboard", "matplotlib", "hydra", "rich", "sklearn", "torch.distributed.checkpoint")
    code = f"import sys, hoptim.tracking; from hoptim import *; print([m for m in {heavy} if m in sys.modules])"
    assert output_of(code) == "[]"
