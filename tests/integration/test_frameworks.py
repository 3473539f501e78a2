"""hoptim under Lightning, Accelerate and Hugging Face's Trainer: their run is a plain loop's run, bit for bit."""

from __future__ import annotations

import copy
import re
import runpy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import accelerate_digits
import lightning as L
import lightning_digits
import numpy as np
import pytest
import reviews
import torch
import trainer_text
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState
from cases import same
from digits import digits, example_weights, network, train_loss, val_loss
from jobs import ROOT
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, BertForSequenceClassification

import hoptim

TRAIN, VAL, TEST = digits()
BATCHES = [tuple(part[i : i + 100] for part in TRAIN) for i in range(0, 600, 100)]
WARM = hoptim.Implicit(hoptim.WarmStart(hoptim.Neumann(terms=3)), damping=1.0)


@pytest.fixture(autouse=True)
def float32(float64: None) -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hyperstep every fourth step, from the first on, with a solver that carries state."""
    made = hoptim.BilevelOptimizer

    def make(*args: Any, **options: Any) -> hoptim.BilevelOptimizer:
        return made(*args, **{**options, "every": 4, "warmup": 0, "hypergradient": WARM})

    monkeypatch.setattr(hoptim, "BilevelOptimizer", make)


def state(optimizer: hoptim.BilevelOptimizer) -> dict[str, Any]:
    """Weights, and what a checkpoint of the optimizer holds: hyperparameters, counters, both optimizers, the solver.

    Less the random states in which a pass over the validation batches was begun: a loader draws from them, a list does not.
    """
    weights = {name: p.detach().clone() for name, p in optimizer.problem.weights().items()}
    saved = copy.deepcopy(optimizer.state_dict())
    saved["hoptim"]["val_batches"] = saved["hoptim"]["val_batches"]["position"]
    return {"weights": weights, "optimizer": saved}


def plain(
    optimizer: Any,
    scheduler: Any,
    batches: list[Any],
    *,
    together: int = 1,
    clip: float | None = None,
    halved: bool = False,
    period: int = 1,
) -> dict[str, Any]:
    """The loop of the README, ``together`` batches a step; the scheduler's step after each ``period`` of them."""
    for i, batch in enumerate(batches):
        if i % together == 0:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            loss = optimizer.loss(batch)
        (loss / together).backward()
        if (i + 1) % together == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(optimizer.problem.model.parameters(), clip)
            optimizer.step()
        if (i + 1) % period == 0:
            scheduler.step()
    return state(optimizer)


def noting(optimizer: hoptim.BilevelOptimizer) -> list[tuple[Any, Tensor]]:
    """The batches that its ``loss`` will see, with the state of torch's generator before each."""
    seen, loss = [], optimizer.loss

    def noted(batch: Any) -> Tensor:
        seen.append((batch, torch.get_rng_state()))
        return loss(batch)

    optimizer.loss = noted  # type: ignore[method-assign]
    return seen


def with_outputs(monkeypatch: pytest.MonkeyPatch, example: Any) -> None:
    """Let the example's training loss return its logits too."""
    loss = example.train_loss
    monkeypatch.setattr(example, "train_loss", lambda net, learned, b: (loss(net, learned, b), net(b[0])))
    monkeypatch.setattr(hoptim, "Problem", partial(hoptim.Problem, has_aux=True))


# Lightning


def lightning_fit(
    folder: Path, epochs: int = 2, seed: int = 0, size: int = 100, ckpt_path: Any = None, **options: Any
) -> Any:
    torch.manual_seed(seed)
    module = lightning_digits.Digits(VAL)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    quiet |= {"accelerator": "cpu", "default_root_dir": folder, "max_epochs": epochs, "num_sanity_val_steps": 0}
    trainer = L.Trainer(**{**quiet, **options})
    loader, val_loader = DataLoader(TensorDataset(*TRAIN), size), DataLoader(TensorDataset(*VAL), 200)
    trainer.fit(module, loader, val_loader, ckpt_path=ckpt_path)
    return trainer


def lightning_plain(batches: list[Any] = BATCHES * 2, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    (optimizer,), (scheduler,) = lightning_digits.Digits(VAL).configure_optimizers()
    optimizer.hooks = ()
    return plain(optimizer, scheduler, batches, **{"period": 6, **options})


@pytest.mark.parametrize(
    ("options", "by_hand", "hypersteps"),
    [
        ({}, {}, 3),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}, 3),
        ({"accumulate_grad_batches": 3}, {"together": 3}, 1),
        ({"precision": "bf16-mixed"}, {"halved": True}, 3),
    ],
    ids=["plain", "clipped", "accumulated", "bf16"],
)
def test_lightning_is_the_plain_loop(options: Any, by_hand: Any, hypersteps: int, tmp_path: Path) -> None:
    trainer = lightning_fit(tmp_path, **options)
    expected = lightning_plain(**by_hand)
    assert same(state(trainer.optimizers[0]), expected)
    assert trainer.optimizers[0].hyper_steps == hypersteps
    assert trainer.optimizers[0].inner_steps == trainer.global_step
    if options:
        assert not same(lightning_plain()["weights"], expected["weights"])


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=["plain", "accumulated"])
def test_lightning_with_outputs_beside_the_loss_is_the_run_without(options: Any, monkeypatch: Any, tmp_path: Path) -> None:
    expected, shapes = state(lightning_fit(tmp_path, **options).optimizers[0]), []

    def training_step(module: Any, batch: Any, _: int) -> Tensor:
        loss, z = module.optimizers().loss(batch)
        shapes.append(tuple(z.shape))
        return loss

    with_outputs(monkeypatch, lightning_digits)
    monkeypatch.setattr(lightning_digits.Digits, "training_step", training_step)
    (optimizer,) = lightning_fit(tmp_path, **options).optimizers
    assert same(state(optimizer), expected)
    assert shapes == [(100, 10)] * 12
    assert optimizer.hyper_steps > 0


def test_lightning_logs_the_record_and_the_validation_loss(tmp_path: Path) -> None:
    trainer = lightning_fit(tmp_path)
    module, (optimizer,) = trainer.lightning_module, trainer.optimizers
    logged, row = trainer.callback_metrics, optimizer.record.row()
    assert {"residual", "hypergradient_norm", "hyper_step", "moved"} <= {key.removeprefix("hyper/") for key in logged}
    assert all(logged[f"hyper/{key}"].item() == pytest.approx(row[key]) for key in ("residual", "hypergradient_norm"))
    assert logged["hyper/hyper_step"] == 3
    torch.testing.assert_close(logged["val_loss"], val_loss(module.net, None, VAL).detach())


def test_lightning_fast_dev_run_takes_the_steps_it_says(tmp_path: Path) -> None:
    trainer = lightning_fit(tmp_path, fast_dev_run=4)
    expected = lightning_plain(BATCHES[:4], period=9)
    assert same(state(trainer.optimizers[0])["weights"], expected["weights"])
    assert trainer.optimizers[0].hyper_steps == 1


def test_lightning_resumes_to_the_same_bits(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = lightning_fit(tmp_path, epochs=3, callbacks=[keep], enable_checkpointing=True)
    resumed = lightning_fit(tmp_path, epochs=3, seed=1, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(state(resumed.optimizers[0]), state(whole.optimizers[0]))
    assert (resumed.optimizers[0].hyper_steps, resumed.global_step) == (4, 18)
    assert state(whole.optimizers[0])["optimizer"]["hoptim"]["solver_state"]["solution"].any()


def test_lightning_on_two_ranks_is_one_process_on_all_examples(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True)
    ranks = DDPStrategy(process_group_backend="gloo", start_method="fork")
    lightning_fit(tmp_path, size=50, devices=2, strategy=ranks, callbacks=[keep], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    orders = [torch.randperm(600, generator=torch.Generator().manual_seed(epoch)) for epoch in range(2)]  # Lightning's own
    expected = lightning_plain([tuple(part[index] for part in TRAIN) for order in orders for index in order.split(100)])
    weights = {name.removeprefix("net."): value for name, value in saved["state_dict"].items()}
    torch.testing.assert_close(weights, expected["weights"], rtol=1e-4, atol=1e-5)  # the sums are in another order
    (optimizer,) = saved["optimizer_states"]
    leaves, by_hand = (one["hoptim"]["hparams"]["example_weight"] for one in (optimizer, expected["optimizer"]))
    torch.testing.assert_close(leaves, by_hand, rtol=1e-3, atol=1e-4)
    assert (optimizer["hoptim"]["inner_steps"], optimizer["hoptim"]["hyper_steps"]) == (12, 3)


def test_lightning_moves_the_inner_state_and_nothing_else(tmp_path: Path) -> None:
    (optimizer,) = lightning_fit(tmp_path).optimizers
    before = state(optimizer)
    _optimizer_to_device(optimizer, torch.device("meta"))
    assert all(entry["momentum_buffer"].is_meta for entry in optimizer.inner.state.values())
    assert same(state(optimizer)["optimizer"]["hoptim"], before["optimizer"]["hoptim"])


# Accelerate


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Accelerator]]:
    """Makes one, which clips at 0.1, since the example's 1.0 is not reached so early. They share a state: it is cleared."""

    def make(**options: Any) -> Accelerator:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        here = Accelerator(cpu=True, **options)
        clip = here.clip_grad_norm_
        here.clip_grad_norm_ = lambda parameters, _: clip(parameters, 0.1)
        return here

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def accelerated(accelerator: Accelerator, epochs: int = 2, seed: int = 0) -> Any:
    """The example's run: what its ``prepare`` returned, and the batches."""
    torch.manual_seed(seed)
    prepared = accelerate_digits.prepare(accelerator, TRAIN, VAL)
    seen = noting(prepared[1])
    for _ in range(epochs):
        accelerate_digits.epoch(accelerator, *prepared)
    return prepared, [batch for batch, _ in seen]


def digits_by_hand(losses: Any = (train_loss, val_loss)) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net, learned = network(), example_weights()
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    outer, problem = torch.optim.Adam(learned.parameters(), lr=0.1), hoptim.Problem(net, learned, *losses)
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[VAL])
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1200)


def halved(loss: Any) -> Any:
    """The loss with its network in bfloat16, its outputs in float32 again, as Accelerate wraps ``forward``."""

    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            z = net(x)
        return z.float()

    return lambda net, learned, batch: loss(lambda x: forward(net, x), learned, batch)


@pytest.mark.parametrize(
    ("options", "losses", "together", "hypersteps"),
    [
        ({}, (train_loss, val_loss), 1, 3),
        ({"gradient_accumulation_steps": 2}, (train_loss, val_loss), 2, 1),
        ({"mixed_precision": "bf16"}, (halved(train_loss), halved(val_loss)), 1, 3),
    ],
    ids=["plain", "accumulated", "bf16"],
)
def test_accelerate_is_the_plain_loop(accelerator: Any, options: Any, losses: Any, together: int, hypersteps: int) -> None:
    (_, bilevel, *_, scheduler), batches = accelerated(accelerator(**options))
    by_hand, its_scheduler = digits_by_hand(losses)
    assert same(state(bilevel), plain(by_hand, its_scheduler, batches, together=together, clip=0.1, period=together))
    assert scheduler.get_last_lr() == its_scheduler.get_last_lr()
    assert (bilevel.hyper_steps, bilevel.inner_steps) == (hypersteps, 12 // together)
    unclipped = plain(*digits_by_hand(losses), batches, together=together, period=together)
    assert not same(unclipped["weights"], state(bilevel)["weights"])


def test_accelerate_takes_a_problem_made_before_as_well(accelerator: Any) -> None:
    """On one process and the CPU ``prepare`` gives back the model it was given."""
    first, batches = accelerated(accelerator())
    bilevel, scheduler = digits_by_hand()
    here, loader = accelerator(), [batches[:6], batches[6:]]
    net, optimizer, scheduler = here.prepare(bilevel.problem.model, bilevel, scheduler)
    assert net is bilevel.problem.model
    for part in loader:
        accelerate_digits.epoch(here, net, bilevel, part, optimizer, scheduler)
    assert same(state(bilevel), state(first[1]))


@pytest.mark.parametrize("together", [1, 2])
def test_accelerate_with_outputs_beside_the_loss_is_the_run_without(
    accelerator: Any, together: int, monkeypatch: Any
) -> None:
    options = {"gradient_accumulation_steps": together}
    expected, _ = accelerated(accelerator(**options))
    with_outputs(monkeypatch, accelerate_digits)
    torch.manual_seed(0)
    here, shapes = accelerator(**options), []
    prepared = accelerate_digits.prepare(here, TRAIN, VAL)
    pair = prepared[1].loss

    def loss(batch: Any) -> Tensor:  # as a loop that keeps the outputs for itself
        value, z = pair(batch)
        shapes.append(tuple(z.shape))
        return value

    prepared[1].loss = loss
    for _ in range(2):
        accelerate_digits.epoch(here, *prepared)
    assert same(state(prepared[1]), state(expected[1]))
    assert shapes == [(100, 10)] * 12
    assert prepared[1].hyper_steps > 0


def two_ranks(folder: Path) -> None:
    """The example's run on one of two ranks, kept with the batches that it saw."""
    accelerator = Accelerator(cpu=True)
    (_, bilevel, *_), batches = accelerated(accelerator)
    torch.save((state(bilevel), batches), folder / f"{accelerator.process_index}.pt")


def test_accelerate_on_two_ranks_is_one_process_on_all_examples(accelerator: Any, tmp_path: Path) -> None:
    AcceleratorState._reset_state(True)
    debug_launcher(two_ranks, (tmp_path,))
    (first, batches), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    by_hand, scheduler = digits_by_hand()
    together = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(batches, others, strict=True)]
    scheduler.step, step = lambda: (step(), step()), scheduler.step  # Accelerate's own takes a step a rank
    expected = plain(by_hand, scheduler, together, clip=1.0)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=1e-4, atol=1e-5)  # sums in another order
    leaves, its_leaves = (one["optimizer"]["hoptim"]["hparams"]["example_weight"] for one in (first, expected))
    torch.testing.assert_close(leaves, its_leaves, rtol=1e-3, atol=1e-4)
    assert (len(batches), by_hand.hyper_steps) == (6, 1)


def test_accelerate_resumes_to_the_same_bits(accelerator: Any, tmp_path: Path) -> None:
    here = accelerator()
    whole, _ = accelerated(here, epochs=1)
    here.save_state(tmp_path)
    accelerate_digits.epoch(here, *whole)
    there = accelerator()
    resumed, _ = accelerated(there, epochs=0, seed=1)
    with torch.serialization.safe_globals([type(np.dtype("uint32"))]):  # Accelerate itself, from NumPy 1.25 on; without it
        there.load_state(tmp_path)  # it passes the random states by
    accelerate_digits.epoch(there, *resumed)
    assert same(state(resumed[1]), state(whole[1]))
    assert (resumed[1].hyper_steps, resumed[1].inner_steps) == (3, 12)


def test_a_loader_that_accelerate_prepared_is_no_source_of_validation_batches(accelerator: Any) -> None:
    """A pass over it stays open, and Accelerate, which asks the loader opened last, would end each accumulation at once."""
    loader = accelerator(gradient_accumulation_steps=2).prepare(DataLoader(TensorDataset(*VAL), 200))
    optimizer, _ = digits_by_hand()
    with pytest.raises(TypeError, match=r"val_batches is a loader that Accelerate prepared.*before prepare\(\)"):
        hoptim.BilevelOptimizer(optimizer.inner, optimizer.outer, optimizer.problem, val_batches=loader)


# Trainer


QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "per_device_train_batch_size": 40,
    "save_strategy": "no",
}
QUIET |= {"logging_strategy": "no"}


def trained(folder: Path, seed: int = 0, resume: Any = None, max_steps: int = 8, **options: Any) -> Any:
    """A Trainer after its training, its optimizer, and what that saw."""
    torch.manual_seed(seed)
    trainer = trainer_text.make(str(folder), max_steps=max_steps, **{**QUIET, **options})
    optimizer = trainer.optimizer
    seen = noting(optimizer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, optimizer, seen


@pytest.mark.parametrize(
    ("options", "together", "hypersteps"),
    [({}, 1, 2), ({"gradient_accumulation_steps": 2}, 2, 2)],
    ids=["plain", "accumulated"],
)
def test_trainer_is_the_plain_loop(options: Any, together: int, hypersteps: int, tmp_path: Path) -> None:
    _, optimizer, seen = trained(tmp_path, **options)
    torch.manual_seed(0)
    trainer = trainer_text.make(str(tmp_path), **QUIET)
    by_hand, scheduler = trainer.optimizer, trainer.lr_scheduler
    trainer.model.train()

    def replayed() -> Iterator[Any]:  # with the dropout masks that the Trainer's run had
        for batch, generator in seen:
            torch.set_rng_state(generator)
            yield batch

    assert same(state(optimizer), plain(by_hand, scheduler, replayed(), together=together, clip=1.0, period=together))
    assert (optimizer.hyper_steps, optimizer.inner_steps, len(seen)) == (hypersteps, 8, 8 * together)


def test_trainer_resumes_to_the_same_bits(tmp_path: Path) -> None:
    _, whole, _ = trained(tmp_path, save_strategy="steps", save_steps=6)
    _, resumed, seen = trained(tmp_path / "again", seed=1, resume=str(tmp_path / "checkpoint-6"))
    assert same(state(resumed), state(whole))
    assert (resumed.hyper_steps, resumed.inner_steps, len(seen)) == (2, 8, 2)


def test_trainer_evaluates_and_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    trainer, optimizer, seen = trained(tmp_path, max_steps=4)
    before, looked = state(optimizer), len(seen)
    words = reviews.tokenizer()
    batch = words.pad(reviews.reviews(words, 200, 0.0, seed=1), return_tensors="pt")
    expected = trainer_text.val_loss(trainer.model, None, batch).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert same(state(optimizer), before)
    assert len(seen) == looked


def test_trainer_saves_a_model_that_is_loaded_from_its_folder(tmp_path: Path) -> None:
    trainer, _, _ = trained(tmp_path, max_steps=4)
    trainer.save_model(str(tmp_path / "model"))
    model = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert same(dict(model.state_dict()), dict(trainer.model.state_dict()))
    text = "[CLS] a warm film"
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text) == reviews.tokenizer()(text)


# The examples as they are


@pytest.mark.parametrize("name", ["digits", "accelerate_digits", "lightning_digits", "reviews", "trainer_text"])
def test_the_code_that_is_tested_here_is_that_of_the_example(name: str) -> None:
    example, helper = (ROOT / folder / f"{name}.py" for folder in ("scripts/examples", "tests/helpers"))
    assert helper.read_text() == example.read_text()


@pytest.mark.parametrize("shorter", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "epochs", "fewer", "pattern", "good"),
    [
        ("lightning_digits", "max_epochs=200", "max_epochs=100", r"test accuracy ([\d.]+)", lambda found: found > 0.9),
        ("accelerate_digits", "range(200)", "range(100)", r"test accuracy ([\d.]+)", lambda found: found > 0.9),
        ("trainer_text", "epochs=15", "epochs=15", r"'eval_loss': '?([\d.]+)", lambda found: found < 0.6),
    ],
    ids=["lightning", "accelerate", "trainer"],
)
def test_examples_run_and_learn(
    name: str, epochs: str, fewer: str, pattern: str, good: Any, shorter: bool, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.undo()  # hypersteps as the example has them
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "scripts" / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) < 60
    assert text.count(epochs) == 1
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "examples"))
    Path("example.py").write_text(text.replace(epochs, fewer) if shorter else text)
    runpy.run_path("example.py", run_name="__main__")
    assert good(float(re.findall(pattern, capsys.readouterr().out)[-1]))
