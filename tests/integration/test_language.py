"""The language model's experiment: its figures, its hyperparameters, and what it says about texts that are not there."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from jobs import result, rows, train
from safetensors.torch import load_file

SIZES = {"train": 12, "val": 6, "test": 5, "length": 4, "vocabulary": 6, "hidden": 3}
SHORT = [f"task.{name}={value}" for name, value in SIZES.items()]
SHORT += ["outer_steps=2", "inner_steps=4", "every=2", "warmup=2", "batch_size=4", "hoptim/tracker=[]"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files: words that mostly follow one another in a circle."""
    folder, draws = tmp_path_factory.mktemp("text"), random.Random(0)
    for name in ("train", "valid", "test"):
        at, words = 0, []
        for _ in range(800):
            at = (at + 1) % 8 if draws.random() < 0.8 else draws.randrange(8)
            words.append("abcdefgh"[at])
        (folder / f"{name}.txt").write_text(" ".join(words))
    return folder


@pytest.mark.parametrize("per", ["layer", "unit"])
def test_the_experiment_learns_and_measures_perplexity(text: Path, tmp_path: Path, per: str) -> None:
    words = (f"task.root={text}", f"hydra.run.dir={tmp_path}", f"task.per={per}", f"plots={str(per == 'layer').lower()}")
    train("experiment=paper/language", *words, *SHORT)
    final = result(tmp_path)
    assert final["hypersteps"] == final["moved"] == 4
    assert final["hyperparameters"] == (7 if per == "layer" else 3 * 3 + 6 + 2 * 12 * 3 + 2)
    assert final["test_perplexity"] == pytest.approx(math.exp(final["test_loss"]))
    assert rows(tmp_path)[-1]["val_perplexity"] == final["val_perplexity"]
    rates = {name: value for name, value in load_file(tmp_path / "hyperparameters.safetensors").items() if "rate" in name}
    assert all(((value > 0) & (value < 1)).all() for value in rates.values())
    assert all((value - 0.1).abs().max() > 1e-3 for value in rates.values())  # each has moved from its start
    if per == "layer":
        plain = result(tmp_path / "baselines" / "fixed, Merity et al.")
        assert plain["hypersteps"] == 0
        assert plain["test_perplexity"] != final["test_perplexity"]
        assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_what_is_wrong_is_named_with_its_remedy(text: Path, tmp_path: Path) -> None:
    cases = {
        f"task.root={tmp_path}/nowhere": "nowhere/train.txt is not there: put plain text into train.txt, valid.txt",
        f"task.root={text} task.train=900": "task.train=900: train.txt has 160 sequences of 5 words",
        f"task.root={text} task.per=word": "task.per='word': give layer or unit",
    }
    for place, (options, words) in enumerate(cases.items()):
        folder = tmp_path / str(place)
        train("experiment=paper/language", f"hydra.run.dir={folder}", *SHORT, *options.split(), "plots=false", check=False)
        assert words in result(folder)["error"]
