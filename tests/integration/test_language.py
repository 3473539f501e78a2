"""The language model's task: its masks, penalties, hypergradient and perplexity by value, and its experiment."""

from __future__ import annotations

import json
import math
import random
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import ROOT, result, rows, train
from tasks import task as tasks
from tasks.language import Language, LanguageModel, corpus, draw, kept, vocabulary_of, words_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

import hoptim

START = {"input": 0.2, "hidden": 0.3, "output": 0.25, "embedding": 0.15, "weight": 0.1, "activation": 0.7, "temporal": 0.4}
SIZES = {"train": 12, "val": 6, "test": 5, "length": 4, "vocabulary": 6, "hidden": 3}


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


def made(text: Path, **options: Any) -> Language:
    task = Language(root=str(text), start=START, **SIZES | options)
    torch.manual_seed(0)
    task.parts = task.setup(0)
    return task


def spread(model: nn.Module) -> nn.Module:
    """The model with weights that are large enough to matter."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.6)
    return model


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_masks_have_the_mean_of_their_formula_and_drop_as_often_as_they_should(p: float) -> None:
    torch.manual_seed(1)
    masks = kept(torch.tensor(p), (400, 1000), 0.1)
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    logit = np.log(p / (1 - p)) + np.log(u / (1 - u))
    of_formula = (1 - 1 / (1 + np.exp(-logit / 0.1))) / (1 - p)
    assert masks.mean().item() == pytest.approx(of_formula.mean(), abs=5 * of_formula.std() / 400_000**0.5)
    assert of_formula.mean() == pytest.approx(1, abs=0.05)
    assert (masks * (1 - p) < 0.5).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 400_000) ** 0.5)
    cold = kept(torch.tensor(p), (1000,), 1e-4) * (1 - p)
    assert ((cold < 1e-3) | (cold > 1 - 1e-3)).double().mean() > 0.99


@pytest.mark.parametrize("shape", [(), (3,)])
def test_masks_have_the_derivative_of_differences_in_the_rate(shape: tuple[int, ...]) -> None:
    rate, weights = torch.rand(shape) * 0.6 + 0.2, torch.randn(5, 1, 3)

    def value(rate: Tensor) -> Tensor:
        torch.manual_seed(2)
        return (kept(rate, (5, 1, 3), 0.3) * weights).sum()

    (found,) = torch.autograd.grad(value(at := rate.clone().requires_grad_()), at)
    for place in range(rate.numel()):
        step = torch.zeros(rate.numel())
        step[place] = 1e-6
        ends = [value(rate + sign * step.view(shape)) for sign in (1, -1)]
        assert found.flatten()[place].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-6, rel=1e-5)


def lstm_of(model: LanguageModel, masks: Tensor | None = None) -> nn.LSTM:
    """torch's own LSTM of two layers with the model's weights."""
    found = nn.LSTM(3, 3, num_layers=2, batch_first=True)
    with torch.no_grad():
        for number, cell in enumerate(model.cells):
            for name, weight in cell.named_parameters():
                masked = weight * masks[number] if masks is not None and name == "weight_hh" else weight
                getattr(found, f"{name}_l{number}").copy_(masked)
    return found


def test_without_masks_it_is_torchs_lstm(text: Path) -> None:
    model, tokens = spread(LanguageModel(6, 3)), torch.randint(6, (5, 4))
    logits, left, output = model(tokens)
    expected = lstm_of(model)(model.embedding(tokens))[0]
    assert torch.allclose(output, expected)
    assert torch.equal(left, output)
    assert torch.allclose(logits, model.decoder(expected))


def test_masks_are_in_their_places_and_the_same_at_all_words(text: Path) -> None:
    task, model = made(text), spread(LanguageModel(6, 3))
    tokens, masks = torch.randint(6, (5, 4)), task.masks(task.hparams(model), 5)
    logits, left, output = model(tokens, masks)
    lstm = lstm_of(model, masks["weight"])
    first, second = nn.LSTM(3, 3, batch_first=True), nn.LSTM(3, 3, batch_first=True)
    for number, layer in enumerate((first, second)):
        layer.load_state_dict({k[:-1] + "0": v for k, v in lstm.state_dict().items() if k.endswith(f"l{number}")})
    x = (model.embedding.weight * masks["embedding"])[tokens] * masks["input"]
    expected = second(first(x)[0] * masks["hidden"])[0]
    assert torch.allclose(output, expected)
    assert torch.allclose(left / output, masks["output"].expand(5, 4, 3))
    assert torch.allclose(logits, model.decoder(left))
    assert masks["embedding"].shape == (6, 1)
    assert masks["input"].shape == (5, 1, 3)


@pytest.mark.parametrize(("per", "count"), [("layer", 7), ("unit", 3 * 3 + 6 + 2 * 12 * 3 + 2)])
def test_there_are_seven_hyperparameters_or_one_a_unit(text: Path, per: str, count: int) -> None:
    task = made(text, per=per)
    hparams = task.hparams(task.model())
    assert sum(leaf.numel() for leaf in hparams.parameters()) == count
    assert hparams["rate.weight"].mean().item() == pytest.approx(0.1)
    assert sorted(group["lr"] for group in hparams.optimizer().param_groups) == [0.05, 0.3]


def test_the_loss_has_the_penalties_of_the_formula(text: Path) -> None:
    task, batch = made(text), torch.arange(5)
    hparams = task.hparams(task.model())
    logits, left, output = torch.randn(5, 4, 6), torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    entropy = [-logits[i, t].log_softmax(0)[task.tokens[i, t + 1]] for i in range(5) for t in range(4)]
    activation = [left[i, t, k] ** 2 for i in range(5) for t in range(4) for k in range(3)]
    temporal = [(output[i, t + 1, k] - output[i, t, k]) ** 2 for i in range(5) for t in range(3) for k in range(3)]
    expected = np.mean(entropy) + 0.7 * np.mean(activation) + 0.4 * np.mean(temporal)
    found = task.criterion(torch.cat([logits, left, output], dim=-1), hparams, batch)
    assert found.item() == pytest.approx(expected.item())


def test_the_hypergradient_is_that_of_training_again_with_other_values(text: Path) -> None:
    task = made(text)
    model = spread(task.model())
    hparams, start = task.hparams(model), parameters_to_vector(model.parameters()).detach()
    batches, val = [torch.arange(4), torch.arange(4, 8), torch.arange(8, 12)], task.parts["val"]
    problem = hoptim.Problem(model, hparams, task.train_loss, task.val_loss)

    def inner() -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    def trained() -> float:
        nn.utils.vector_to_parameters(start.clone(), model.parameters())
        torch.manual_seed(5)
        optimizer = inner()
        for batch in batches:
            optimizer.zero_grad()
            task.train_loss(model, hparams, batch).backward()
            optimizer.step()
        with torch.no_grad():
            return task.val_loss(model, hparams, val).item()

    torch.manual_seed(5)
    found = hoptim.hypergradient(problem, None, val, hoptim.Replay(batches), inner=inner())
    for name, leaf in hparams.named_parameters():
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                leaf += sign * 1e-5
            ends.append(trained())
        with torch.no_grad():
            leaf += 1e-5
        assert found.grads[name].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4), name


@pytest.mark.parametrize("per", ["layer", "unit"])
def test_the_implicit_hypergradient_is_that_of_a_dense_solution(text: Path, per: str) -> None:
    task = made(text, per=per)
    model = spread(task.model())
    hparams = task.hparams(model)
    batch, val = torch.arange(8), task.parts["val"]
    names = [name for name, _ in model.named_parameters()]
    shapes = [weight.shape for weight in model.parameters()]
    w = parameters_to_vector(model.parameters()).detach().requires_grad_()

    class At(nn.Module):
        def forward(self, *inputs: Any) -> Any:
            parts = [part.view(shape) for part, shape in zip(w.split([s.numel() for s in shapes]), shapes, strict=True)]
            return functional_call(model, dict(zip(names, parts, strict=True)), inputs)

    torch.manual_seed(6)
    (F,) = torch.autograd.grad(task.train_loss(At(), hparams, batch), w, create_graph=True)
    A = torch.stack([torch.autograd.grad(entry, w, retain_graph=True)[0] for entry in F])
    (g,) = torch.autograd.grad(task.val_loss(At(), hparams, val), w)
    x = torch.linalg.solve(A + 2.0 * torch.eye(len(A)), g)
    expected = torch.autograd.grad(F, list(hparams.parameters()), -x)
    problem = hoptim.Problem(model, hparams, task.train_loss, task.val_loss)
    torch.manual_seed(6)
    method = hoptim.Implicit(hoptim.MINRES(terms=300, tolerance=1e-12), curvature=hoptim.Exact(), damping=2.0)
    found = hoptim.hypergradient(problem, batch, val, method)
    for (name, _), one in zip(hparams.named_parameters(), expected, strict=True):
        assert torch.allclose(found.grads[name], one, rtol=1e-6, atol=1e-10), name


def test_perplexity_is_the_exponential_of_the_mean_over_all_words(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = made(text)
    model = spread(task.model())
    monkeypatch.setattr(tasks, "CHUNK", 4)  # so that the six are measured in unequal parts
    found = tasks.measure(task, model, task.hparams(model), {"val": task.parts["val"]})
    loss = task.val_loss(model, None, task.parts["val"]).item()
    assert found["val_loss"] == pytest.approx(loss)
    assert found["val_perplexity"] == pytest.approx(math.exp(loss))
    assert set(found) == {"val_loss", "val_accuracy", "val_perplexity"}


def test_parts_come_from_their_files_and_sequences_do_not_overlap(text: Path) -> None:
    task = made(text)
    for part, name in {"train": "train.txt", "val": "valid.txt", "test": "test.txt"}.items():
        numbers = torch.tensor([task.words.get(word, 0) for word in words_of(text / name)])
        pieces = {tuple(piece.tolist()) for piece in numbers[:800].view(-1, 5)}
        assert all(tuple(task.tokens[i].tolist()) in pieces for i in task.parts[part])
    drawn = draw(torch.arange(50), 10, 5, torch.Generator().manual_seed(0), "train")
    assert sorted(drawn.flatten().tolist()) == list(range(50))
    assert vocabulary_of(["b", "b", "a", "<unk>", "a", "b", "c"], 3) == {"<unk>": 0, "b": 1, "a": 2}


def test_what_is_wrong_is_named_with_its_remedy(text: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/train.txt is not there: put plain text into train.txt, valid.txt"):
        made(tmp_path / "nowhere")
    corpus.cache_clear()
    with pytest.raises(ValueError, match=r"task.train=900: train.txt has 160 sequences of 5 words"):
        made(text, train=900)
    with pytest.raises(ValueError, match=r"task.per='word': give layer or unit"):
        made(text, per="word")
    with pytest.raises(ValueError, match=r"give one number each to input, hidden"):
        Language(root=str(text), start={"input": 0.1})


SHORT = [f"task.{name}={value}" for name, value in SIZES.items()]
SHORT += ["outer_steps=2", "inner_steps=4", "every=2", "warmup=2", "batch_size=4", "hoptim/tracker=[]"]


@pytest.mark.parametrize("per", ["layer", "unit"])
def test_the_experiment_learns_and_measures_perplexity(text: Path, tmp_path: Path, per: str) -> None:
    words = (f"task.root={text}", f"hydra.run.dir={tmp_path}", f"task.per={per}", f"plots={str(per == 'layer').lower()}")
    train("experiment=paper/language", *words, *SHORT)
    final = result(tmp_path)
    assert final["hypersteps"] == final["moved"] == 4
    assert final["hyperparameters"] == (7 if per == "layer" else 3 * 3 + 6 + 2 * 12 * 3 + 2)
    assert final["test_perplexity"] == pytest.approx(math.exp(final["test_loss"]))
    assert rows(tmp_path)[-1]["val_perplexity"] == final["val_perplexity"]
    if per == "layer":
        plain = result(tmp_path / "baselines" / "fixed, Merity et al.")
        assert plain["hypersteps"] == 0
        assert plain["test_perplexity"] != final["test_perplexity"]
        assert (tmp_path / "curves.png").stat().st_size > 10_000


def script() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    return runpy.run_path(str(ROOT / "scripts" / "examples" / "language_model.py"), run_name="example")


def test_the_searches_begin_at_the_start_stay_in_their_ranges_and_spend_their_budget(text: Path) -> None:
    pytest.importorskip("optuna")
    found = script()
    space = found["searched"].__globals__
    space["BUDGET"] = 3
    cfg = found["config"](str(text), 3, *SHORT)
    for way in ("at_random", "by_optuna"):
        seen = list(found["searched"](cfg, way, found[way]))
        assert [row.trial for row in seen][:2] == [0, 0]
        assert seen[-1].trainings == pytest.approx(3)
        assert all(a.seconds < b.seconds for a, b in pairwise(seen))
        assert len({row.val for row in seen}) > 2
    draws = found["at_random"](3)
    assert next(draws)[0] is None
    for values, *_ in (next(draws) for _ in range(50)):
        assert all(found["RANGES"][name][0] <= value <= found["RANGES"][name][1] for name, value in values.items())
    first = next(found["by_optuna"](3))[0]
    assert first == pytest.approx(dict(cfg.task.start))


def test_learning_is_charged_for_its_hypersteps_and_the_best_model_is_that_of_validation(text: Path, tmp_path: Path) -> None:
    found = script()
    cfg = found["config"](str(text), 0, *SHORT, "warmup=12", "outer_steps=5")
    row = list(found["learned"](cfg, "learned, 7"))
    assert row[-1].trainings > 1.3
    Row = found["Row"]
    figures = ((5.0, 1.0), (3.0, 9.0), (4.0, 2.0))
    some = [Row("fixed", 0, 0, i, float(i), i / 2, val, test) for i, (val, test) in enumerate(figures)]
    best = found["best_until"]
    assert best(some, lambda row: row.seconds, 2.0).test == 9.0
    assert best(some, lambda row: row.seconds, 0.5).test == 1.0
    found["write"](tmp_path / "rows.json", some)
    assert found["read"](tmp_path / "rows.json") == some
    assert json.loads((tmp_path / "rows.json").read_text())["columns"][-1] == "test"
    assert "| fixed | 75.72, 71.91 | 3.0 | 9.0 |  | 9.0 | 1.0 | 2 |" in found["table"](some)
    found["draw"](some[1:], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5_000
