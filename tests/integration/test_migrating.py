"""scripts/examples/migrating: hoptim beside other libraries and a dense Hessian; the page shows the files' text."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jobs import ROOT
from torch import Tensor, func
from torch.nn import functional as F

FOLDER = ROOT / "scripts" / "examples" / "migrating"
sys.path.append(str(FOLDER))

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
def task() -> Iterator[Any]:
    """The task, whose import makes float64 the default dtype, as it is in each test."""
    before = torch.get_default_dtype()
    yield importlib.import_module("digits_task")
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def ours(task: Any) -> dict[str, tuple[list[Tensor], float]]:
    """By method, the hypergradients and the test loss of hoptim's half."""
    torch.set_default_dtype(torch.float64)
    side, half = importlib.import_module("side_by_side"), importlib.import_module("with_hoptim")
    with pytest.warns(UserWarning, match="STEP_TOO_LARGE"):
        return {name: side.run(half.with_hoptim, method)[:2] for name, method in half.METHODS.items()}


def test_the_page_has_the_methods_of_each_script() -> None:
    assert {library for library, *_ in ROWS} == set(NEEDS)
    for library in NEEDS:
        body = ast.parse((FOLDER / f"from_{library}.py").read_text()).body
        (rows,) = (node.value for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
        keys = {key.value for key in rows.keys if isinstance(key, ast.Constant)}
        assert {method for row, method, *_ in ROWS if row == library} == keys


def test_hoptims_half_ends_where_the_page_says_and_where_the_other_ended(ours: Any) -> None:
    apart = []
    for library, method, theirs, own, *_ in ROWS:
        assert ours[method][1] == pytest.approx(float(own), abs=1e-6)
        if float(theirs) != pytest.approx(float(own), abs=2e-6):
            apart.append((library, method))
    assert apart == [("betty", LARGE), ("betty", "CG, 10 products"), ("torchopt", LARGE)]  # as the page explains


def test_a_step_that_is_too_large_moves_nothing_and_learning_helps(ours: Any, task: Any) -> None:
    without = task.test_loss(task.plain())
    grads, loss = ours[LARGE]
    assert grads == []
    assert loss == pytest.approx(without, abs=1e-12)
    assert f"the test loss is {without:.3f}" in PAGE.replace("\n", " ")
    assert all(loss < 0.6 * without for name, (_, loss) in ours.items() if name != LARGE)


def test_the_first_hypergradient_is_that_of_a_dense_hessian(ours: Any, task: Any) -> None:
    def losses(weights: Tensor, index: Tensor) -> Tensor:
        weight, bias = weights[:640].view(10, 64), weights[640:]
        return F.cross_entropy(F.linear(task.x[index], weight, bias), task.y[index], reduction="none")

    def train_loss(weights: Tensor, leaf: Tensor) -> Tensor:
        return (leaf.sigmoid() * losses(weights, task.train)).mean() + 0.005 * weights.square().sum()

    leaf = torch.zeros(500)
    weights = torch.cat([p.detach().flatten() for p in task.start().parameters()])
    for _ in range(task.WARMUP):
        weights = weights - task.LR * func.grad(train_loss)(weights, leaf)
    A = func.hessian(train_loss)(weights, leaf)
    B = func.jacrev(func.grad(train_loss), argnums=1)(weights, leaf)
    g = func.grad(lambda weights: losses(weights, task.val).mean())(weights)
    powers = [g]
    for _ in range(20):
        powers.append(powers[-1] - 0.5 * A @ powers[-1])
    for method, x in {"darts": g, "Neumann, 20 terms, 0.5": 0.5 * sum(powers)}.items():
        torch.testing.assert_close(ours[method][0][0], -B.T @ x, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("library", NEEDS)
@pytest.mark.filterwarnings("ignore")
def test_the_other_half_computes_the_same(library: str, ours: Any) -> None:
    module, remedy = NEEDS[library]
    pytest.importorskip(module, reason=f"{module} is not installed: {remedy}")
    script, side = importlib.import_module(f"from_{library}"), importlib.import_module("side_by_side")
    agree = [method for row, method, theirs, own, *_ in ROWS if row == library and abs(float(theirs) - float(own)) < 2e-6]
    for method in dict.fromkeys(agree):
        if (library, method) == ("betty", "CG, 10 products"):  # right in the repository, wrong in the release
            continue
        grads, loss, _ = side.run(*script.ROWS[method])
        assert side.difference(grads, ours[method][0]) < (1e-4 if method == "darts" else 1e-12)
        assert loss == pytest.approx(ours[method][1], abs=2e-6)


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
