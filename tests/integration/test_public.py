"""scripts/studies/public: the changes to ten public scripts, their counts, and what applies and watches them."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import pytest
import torch
from jobs import ROOT, run

FOLDER = ROOT / "scripts" / "studies" / "public"
ROW = r"^\| [^|]*`[^|]*\| (\d+) \| (\d+), (\d+) \|"
FILE = r"^\| `(\w+)\.ed` \| (\S+) `(\S+)`[^|]*\| (\w+) \|"


def test_the_counts_on_the_page_are_those_of_the_changes() -> None:
    page = (FOLDER / "README.md").read_text()
    told = {
        line.split()[0]: tuple(map(int, line.split()[1:])) for line in run("studies/public/count.py").stdout.splitlines()[1:]
    }
    names = [name for name, *_ in re.findall(FILE, page, re.MULTILINE)]
    assert sorted(names) == sorted(told) == sorted(path.stem for path in FOLDER.glob("*.ed"))
    on_the_page = [tuple(map(int, row)) for row in re.findall(ROW, page.partition("## What it took")[2], re.MULTILINE)]
    assert on_the_page == [told[name] for name in names]
    assert all(9 <= added <= 14 and 1 <= changed <= 3 for added, changed, _ in on_the_page)  # as hoptim/training says


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ed")), ids=lambda path: path.stem)
def test_a_change_says_hoptim(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines.count("import hoptim") == 1
    assert all(len(line) <= 125 for line in lines)
    assert sum("hoptim.BilevelOptimizer(" in line for line in lines) == 1


SMALL = """
import torch
import hoptim
torch.manual_seed(0)
model, x = torch.nn.Linear(3, 1), torch.randn(20, 3)
hparams = hoptim.recipes.WeightDecay(model)
inner = torch.optim.SGD(model.parameters(), lr=0.1)
def val_loss(model, hparams, batch):
    return (model(batch) - 1).square().mean()
def train_loss(model, hparams, batch):
    return val_loss(model, hparams, batch) + hparams.penalty(model)
problem = hoptim.Problem(model, hparams, train_loss, val_loss)
optimizer = hoptim.BilevelOptimizer(inner, hparams.optimizer(), problem, val_batches=[x[10:]])
for _ in range(12):
    optimizer.zero_grad()
    optimizer.loss(x[:10]).backward()
    optimizer.step()
"""


def test_a_run_is_watched_and_can_be_made_inert(tmp_path: Path) -> None:
    script = tmp_path / "small.py"  # run in a process of its own, as the watch replaces a class of hoptim
    script.write_text(SMALL)
    sooner = run("studies/public/run.py", "--every", 3, "--warmup", 3, script).stdout
    assert "4 hypersteps: {" in sooner  # after steps 3, 6, 9 and 12
    assert re.search(r"decays went by [\d.]+ to [\d.]+\n.*costs [\d.]+ training steps", sooner)
    inert = run("studies/public/run.py", "--inert", script).stdout
    assert "hypersteps" not in inert

    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 1), torch.randn(20, 3)
    for _ in range(12):
        model.zero_grad()
        (model(x[:10]) - 1).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    whole = b"".join(w.detach().numpy().tobytes() for w in model.parameters())
    assert f"weights {hashlib.sha256(whole).hexdigest()[:16]} of 2 tensors after 12 steps" in inert
    assert f"weights {hashlib.sha256(whole).hexdigest()[:16]}" not in sooner


def test_a_rate_takes_the_place_of_levels(tmp_path: Path) -> None:
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    steps = ("studies/public/run.py", "--every", 3, "--warmup", 3)
    plain, level = (
        float(re.findall(r"decays went by \S+ to (\S+)", run(*steps, *rate, script).stdout)[0])
        for rate in (("--rate", 0.1), ())
    )
    # From the first to the last of four hypersteps are three steps of Adam, each of about its rate where all have one sign.
    # The levels of a single decay and the decay itself add up to 0.9 at first.
    assert math.exp(0.27) < plain <= math.exp(0.3) < math.exp(0.9) < level


STRIDED = """
import torch
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
sum(w.sum() for w in model.parameters()).backward()
optimizer.step()
"""


def test_the_digest_is_that_of_the_numbers_in_whatever_order_they_lie(tmp_path: Path) -> None:
    script = tmp_path / "strided.py"
    script.write_text(STRIDED)
    found = run("studies/public/run.py", "--seed", 3, script).stdout
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)  # which the script does not set
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 3))
    whole = b"".join((w.detach() - 0.5).numpy().tobytes() for w in model.parameters())
    assert f"weights {hashlib.sha256(whole).hexdigest()[:16]} of 4 tensors after 1 steps" in found
