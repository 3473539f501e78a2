"""scripts/studies/migrating: hoptim beside other libraries, as its page says; the page shows the files' text."""

from __future__ import annotations

import ast
import re

import pytest
from jobs import ROOT, run

FOLDER = ROOT / "scripts" / "studies" / "migrating"

PAGE = (FOLDER / "README.md").read_text()
NEEDS = {  # what each script imports, and how to get it
    "betty": ("betty", "pip install betty-ml, with Python 3.10"),
    "torchopt": ("torchopt", "pip install torchopt"),
    "higher": ("higher", "pip install higher"),
    "hypertorch": ("hypergrad", "pip install git+https://github.com/prolearner/hypertorch"),
}
ROW = re.compile(
    r"^\| (\w+)[^|]*\| ([^|]+) \| [^|]+ \| (\d\.\d+) \| (\d\.\d+) \| [^|]+ \| [^|]+ \| (\d+) \| (\d+) \|$", re.MULTILINE
)
ROWS = ROW.findall(PAGE)  # library, method, test losses of both, lines of both
LARGE = "Neumann, 20 terms, 4"  # a step for which the series diverges


def functions(name: str) -> dict[str, str]:
    """The source of each function of a script."""
    text = (FOLDER / f"{name}.py").read_text()
    defined = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: str(ast.get_source_segment(text, node)) for node in defined}


def lines(code: str) -> int:
    return len([line for line in code.splitlines() if line.strip()])


@pytest.fixture(scope="module")
def ours() -> dict[str, float]:
    """The test loss of hoptim's half with each method, and of the training without learned weights."""
    found = {}
    for name in ("with_hoptim", "digits_task"):
        told = run(f"studies/migrating/{name}.py").stdout
        found |= {method: float(loss) for method, loss in re.findall(r"^(.+): test loss ([\d.]+)$", told, re.MULTILINE)}
    return found


def test_the_page_has_the_methods_of_each_script() -> None:
    assert {library for library, *_ in ROWS} == set(NEEDS)
    for library in NEEDS:
        body = ast.parse((FOLDER / f"from_{library}.py").read_text()).body
        (rows,) = (node.value for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
        keys = {key.value for key in rows.keys if isinstance(key, ast.Constant)}
        assert {method for row, method, *_ in ROWS if row == library} == keys


def test_hoptims_half_ends_where_the_page_says_and_where_the_other_ended(ours: dict[str, float]) -> None:
    apart = []
    for library, method, theirs, own, *_ in ROWS:
        assert ours[method] == pytest.approx(float(own), abs=1e-6)
        if float(theirs) != pytest.approx(float(own), abs=2e-6):
            apart.append((library, method))
    assert apart == [("betty", LARGE), ("betty", "CG, 10 products"), ("torchopt", LARGE)]  # as the page explains


def test_a_step_that_is_too_large_moves_nothing_and_learning_helps(ours: dict[str, float]) -> None:
    without = ours.pop("without learned weights")
    assert ours[LARGE] == pytest.approx(without, abs=1e-6)
    assert f"the test loss is {without:.3f}" in PAGE.replace("\n", " ")
    assert all(loss < 0.6 * without for name, loss in ours.items() if name != LARGE)


@pytest.mark.parametrize("library", NEEDS)
def test_the_other_half_computes_the_same(library: str) -> None:
    module, remedy = NEEDS[library]
    pytest.importorskip(module, reason=f"{module} is not installed: {remedy}")
    told = run(f"studies/migrating/from_{library}.py", "--once").stdout
    agree = [method for row, method, theirs, own, *_ in ROWS if row == library and abs(float(theirs) - float(own)) < 2e-6]
    for method in dict.fromkeys(agree):
        if (library, method) == ("betty", "CG, 10 products"):  # right in the repository, wrong in the release
            continue
        (line,) = [line for line in told.splitlines() if line.startswith(method)]
        apart, theirs, own = map(float, line.removeprefix(method).split()[:3])
        assert apart < (1e-4 if method == "darts" else 1e-12)
        assert theirs == pytest.approx(own, abs=2e-6)


def test_the_code_on_the_page_is_that_of_the_files() -> None:
    sources = [text for path in FOLDER.glob("*.py") for text in functions(path.stem).values()]
    shown = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    parts = [part.strip() for block in shown for part in re.split(r"\n\n+(?=def )", block)]
    assert [part for part in parts if part not in sources] == []
    trains = {name: text for path in FOLDER.glob("*.py") for name, text in functions(path.stem).items() if "with_" in name}
    assert len(trains) == 6
    assert [name for name, text in trains.items() if text not in parts] == []
    assert parts.count(trains["with_hoptim"]) == len(NEEDS)


def test_the_counts_of_lines_on_the_page_are_those_of_the_code() -> None:
    second = {"Neumann, 20 terms, 0.5": "neumann", "CG, 10 products": "cg", "20 steps unrolled": "reverse"}
    for library, method, _, _, theirs, own in ROWS:
        named = functions(f"from_{library}")
        unrolled = library == "torchopt" and "unrolled" in method
        parts = ["unrolled_with_torchopt" if unrolled else f"with_{library}"]
        parts += [second[method]] if library == "hypertorch" else []
        assert int(theirs) == sum(lines(named[part]) for part in parts)
        assert int(own) == lines(functions("with_hoptim")["with_hoptim"])
