"""scripts/studies/few_shot: the loops on its page are those of the file, and other libraries compute the same."""

from __future__ import annotations

import ast
import re

import pytest
from jobs import ROOT, run

FOLDER = ROOT / "scripts" / "studies" / "few_shot"
PAGE = (FOLDER / "README.md").read_text()
MODULES = {"learn2learn": "learn2learn", "higher": "higher", "TorchOpt": "torchopt"}


def test_the_loops_on_the_page_are_those_of_the_file() -> None:
    text = (FOLDER / "loops.py").read_text()
    defined = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name.startswith("with_")]
    shown = [block.strip() for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)]
    assert set(shown) == {ast.get_source_segment(text, node) for node in defined}


def test_the_costs_on_the_page_are_those_that_were_kept() -> None:
    told = run("studies/few_shot/measure.py", "--saved").stdout.strip().splitlines()
    assert len(told) == 18
    assert [line for line in told if line not in PAGE.splitlines()] == []


def test_hoptims_loop_runs_without_the_others() -> None:
    assert "hoptim: " in run("studies/few_shot/loops.py").stdout


@pytest.mark.parametrize("library", MODULES)
def test_the_loop_of_another_library_ends_at_the_same_weights(library: str) -> None:
    pytest.importorskip(MODULES[library], reason=f"{library} is not installed: see scripts/studies/few_shot/peers.py")
    (line,) = [line for line in run("studies/few_shot/loops.py").stdout.splitlines() if line.startswith(library)]
    assert float(line.rsplit(" ", 1)[1]) < 1e-12


def test_meta_gradients_are_those_of_the_other_libraries() -> None:
    for library, module in MODULES.items():
        pytest.importorskip(module, reason=f"{library} is not installed: see scripts/studies/few_shot/peers.py")
    told = run("studies/few_shot/measure.py", "--rounds", "0").stdout
    assert all(float(line.split("|")[4]) < 1e-10 for line in told.splitlines() if "| hoptim |" in line)
