"""The studies by their commands: the tables of their pages are those of their rows, and small ones are run and checked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from jobs import ROOT, run
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F

STUDIES = ROOT / "scripts" / "studies"
ALLOWED = {"", "Adam 0.1", "SGD 10"}  # headings, and two figures that were rounded from more digits than are kept


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-−+]?\d+(?:\.\d+)?", text.replace("−", "-"))]


def tables(text: str) -> dict[str, list[list[float]]]:
    """The numbers of the lines of all tables, by the first cell of the line."""
    found: dict[str, list[list[float]]] = {}
    for line in text.splitlines():
        if line.startswith("|"):
            first, _, rest = line.strip("|").partition("|")
            found.setdefault(first.strip(" *"), []).append(numbers(rest))
    return found


def test_the_outcomes_of_public_scripts_are_those_of_their_rows() -> None:
    page = tables((STUDIES / "public" / "README.md").read_text())
    told = tables(run("studies/public/outcomes.py", "--saved").stdout)
    names = [first for first in told if first and "---" not in first and first != "script"]
    assert len(names) == 6
    assert [(name, line) for name in names for line in told[name] if line not in page[name]] == []


def records(path: Path) -> list[dict[str, object]]:
    saved = json.loads(path.read_text())
    return [dict(zip(saved["columns"], row, strict=True)) for row in saved["records"]]


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("decay_in_step", 10),
        ("defaults", 30),
        ("holdout", 5),
        ("example_influence", 12),
        ("few_shot", 20),
        ("language", 6),
        ("mixtures", 12),
        ("raters", 14),
        ("sharded", 15),
        ("wrong_labels", 9),
    ],
)
def test_the_lines_of_a_page_are_those_of_its_rows(name: str, least: int) -> None:
    page, told = tables((STUDIES / name / "README.md").read_text()), tables(run(f"studies/{name}/run.py", "--saved").stdout)
    shared = [first for first, lines in told.items() if first in page and any(lines)]
    assert len(shared) >= least
    wrong = {first: line for first in shared for line in told[first] if line not in page[first]}
    assert {first for first in wrong if first not in ALLOWED} == set()


@pytest.mark.parametrize("name", ["one_training", "tuners"])
def test_the_figures_of_a_page_are_those_of_its_rows(name: str) -> None:
    """Its tables are arranged in another way."""
    lines = tables((STUDIES / name / "README.md").read_text()).values()
    told = tables(run(f"studies/{name}/run.py", "--saved").stdout).values()
    figures = {number for many in told for line in many for number in line}
    shown = [number for many in lines for line in many for number in line]
    assert len(shown) > 50
    assert sum(number in figures for number in shown) > 0.95 * len(shown)


def test_a_plain_training_of_the_study_of_defaults_is_a_loop_by_hand_and_is_not_run_again(tmp_path: Path) -> None:
    words = ("studies/defaults/run.py", "--tasks", "cancer", "--settings", "plain", "--seeds", "0", "--out", tmp_path)
    said = run(*words).stdout
    (plain,) = [row for row in records(tmp_path / "rows.json") if row["setting"] == "plain"]
    (learned,) = [row for row in records(tmp_path / "rows.json") if row["setting"] != "plain"]
    assert (plain["hypersteps"], learned["hypersteps"], learned["skipped"]) == (0, 37, 0)  # each tenth step after 120 of 480
    assert learned["products"] == 5 * 37
    torch.set_default_dtype(torch.float32)
    x, y = (torch.tensor(part) for part in load_breast_cancer(return_X_y=True))
    torch.manual_seed(1000)
    train, _, test = torch.randperm(len(x)).split([100, 100, len(x) - 200])
    x = ((x.float() - x[train].float().mean(0)) / x[train].float().std(0)).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches: list[Tensor] = []
    for _ in range(480):
        batches = batches or list(train[torch.randperm(100)].split(25))
        batch = batches.pop()
        optimizer.zero_grad()
        decay = sum(w.square().sum() for w in model.parameters() if w.ndim > 1) * 1e-3 / 2
        (F.cross_entropy(model(x[batch]), y[batch]) + decay).backward()
        optimizer.step()
    assert plain["test"] == pytest.approx(F.cross_entropy(model(x[test]), y[test]).item(), rel=1e-4)
    assert "plain" in said
    assert "cancer, plain" not in run(*words).stdout  # it has its row


def test_solved_to_the_end_ridge_has_its_closed_form_and_the_identity_has_not(tmp_path: Path) -> None:
    methods = ("CG, exact, 50", "CG, GN, 50", "Identity, 0")
    run("studies/fidelity/run.py", "--problems", "ridge", "--seeds", "1", "--out", tmp_path, "--methods", *methods)
    found = {row["method"]: row for row in records(tmp_path / "rows.json")}
    for method in methods[:2]:
        assert (found[method]["cosine"], found[method]["length"]) == pytest.approx((1.0, 1.0), abs=1e-3)
        assert 0 < found[method]["products"] <= 50
    assert found["Identity, 0"]["cosine"] < 0.9
    assert found["Identity, 0"]["products"] == 0
    assert (tmp_path / "fidelity.png").stat().st_size > 5_000
    (seen,) = [row for row in records(tmp_path / "summary.json") if row["method"] == "Identity, 0"]
    assert seen["cosine"] == pytest.approx(found["Identity, 0"]["cosine"], abs=1e-3)


def test_an_unknown_method_is_refused_with_the_names(tmp_path: Path) -> None:
    words = ("--problems", "ridge", "--methods", "Newton", "--out", tmp_path)
    assert "Neumann, exact, 5" in run("studies/fidelity/run.py", *words, check=False).stderr


def test_every_study_has_its_page_and_the_index_names_it() -> None:
    index = (ROOT / "scripts" / "README.md").read_text()
    for folder in STUDIES.iterdir():
        if folder.name != "__pycache__":
            assert (folder / "README.md").is_file(), folder.name
            assert f"(studies/{folder.name}/README.md)" in index
    assert len(index.splitlines()) < 60
