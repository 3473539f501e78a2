"""scripts/examples/public: the changes to ten public scripts, their counts, and what applies and watches them."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ROOT, run

FOLDER = ROOT / "scripts" / "examples" / "public"
sys.path.append(str(FOLDER))

import count  # noqa: E402

NAMES = list(count.SCRIPTS)
ORIGINAL = "one\ntwo\nthree\nfour\nfive\n"
CHANGE = "5a\nsix\n\n.\n3,4c\n3\n.\n2d\n0a\nzero\n.\n"  # as `diff -e` writes it, the end first


def on_the_page() -> list[tuple[int, int, int]]:
    """The counts in the page's table, from its top."""
    _, _, section = (FOLDER / "README.md").read_text().partition("## What it took")
    rows = re.findall(r"^\| [^|]*`[^|]*\| (\d+) \| (\d+), (\d+) \|", section, re.MULTILINE)
    return [(int(added), int(changed), int(dropped)) for added, changed, dropped in rows]


def test_the_counts_on_the_page_are_those_of_the_changes() -> None:
    assert on_the_page() == [count.counts((FOLDER / f"{name}.ed").read_text()) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_change_is_small_and_says_hoptim(name: str) -> None:
    text = (FOLDER / f"{name}.ed").read_text()
    added, changed, _ = count.counts(text)
    assert 9 <= added <= 14  # as README.md and hoptim/training say
    assert 1 <= changed <= 3
    lines = [line for _, _, new in count.hunks(text) for line in new]
    assert lines.count("import hoptim") == 1
    assert all(len(line) <= 125 for line in lines)
    assert sum("hoptim.BilevelOptimizer(" in line for line in lines) == 1


def test_every_change_has_its_script_and_every_script_its_row() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ed")) == sorted(NAMES)
    rows = re.findall(r"^\| `(\w+)\.ed` \| (\S+) `(\S+)`[^|]*\| (\w+) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    told = [(name, one.repository, one.path, one.commit[:7]) for name, one in count.SCRIPTS.items()]
    assert rows == told


def test_a_change_is_applied_as_ed_does() -> None:
    assert count.changed(ORIGINAL, CHANGE) == "zero\none\n3\nfive\nsix\n\n"
    assert count.counts(CHANGE) == (3, 1, 2)
    assert count.counts("3c\na\nb\n.\n") == (1, 1, 0)


def test_what_is_applied_is_checked_against_gits_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert count.blob_hash(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    script = replace(count.SCRIPTS["nanogpt"], blob=count.blob_hash(ORIGINAL.encode()))
    monkeypatch.setattr(count, "SCRIPTS", {"nanogpt": script})
    monkeypatch.setattr(count, "HERE", tmp_path)
    (tmp_path / "nanogpt.ed").write_text(CHANGE)
    original = tmp_path / "nanoGPT" / "train.py"
    count.main(["--originals", str(tmp_path)])
    assert f"nanogpt: there is no nanoGPT in {tmp_path}" in capsys.readouterr().out
    original.parent.mkdir()
    original.write_text(ORIGINAL)
    count.main(["--originals", str(tmp_path)])
    assert original.with_name("hoptim_train.py").read_text() == count.changed(ORIGINAL, CHANGE)
    assert "nanogpt                      3        1        2" in capsys.readouterr().out
    original.write_text(ORIGINAL + "six\n")
    with pytest.raises(SystemExit, match=f"git checkout {script.commit}"):
        count.main(["--originals", str(tmp_path)])


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
    sooner = run("examples/public/run.py", "--every", 3, "--warmup", 3, script).stdout
    assert "4 hypersteps: {" in sooner  # after steps 3, 6, 9 and 12
    assert re.search(r"decays went by [\d.]+ to [\d.]+\n.*costs [\d.]+ training steps", sooner)
    inert = run("examples/public/run.py", "--inert", script).stdout
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
    found = run("examples/public/run.py", "--seed", 3, script).stdout
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)  # which the script does not set
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 3))
    whole = b"".join((w.detach() - 0.5).numpy().tobytes() for w in model.parameters())
    assert f"weights {hashlib.sha256(whole).hexdigest()[:16]} of 4 tensors after 1 steps" in found
