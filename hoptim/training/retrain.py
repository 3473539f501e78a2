"""retrain: train a new model from scratch with hyperparameters that were learned before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hoptim.methods.method import checked_problem
from hoptim.problem.loss_checks import check_takes
from hoptim.problem.problem import Problem
from hoptim.problem.sharding import whole
from hoptim.training import arguments
from hoptim.training.shared_tensors import SharedTensors, find_shared
from hoptim.training.training_optimizer import TrainingOptimizer


def retrain(
    problem: Problem,
    make: Callable[[], nn.Module],
    train: Callable[[nn.Module, Any, Any], Any],
    examples: Any,
    *,
    inner: Callable[[nn.Module], Optimizer],
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Train a new model from scratch, with the hyperparameters of ``problem`` as they are now, held fixed.

    The model of the run that learned them started with other values, and did not train on the validation data. The new model
    trains with the learned values from its first step, on all the given examples, which may include the validation data. It
    is an ordinary training: ``problem.train_loss``, no hypersteps, random numbers from the process's generators, as in the
    last training of :class:`CrossValidated`. The model inside ``problem`` does not change.

    Args:
        problem: the problem whose hyperparameters were learned.
        make: ``make() -> model``, a function that makes a new model.
        train: the training loop, ``train(model, optimizer, examples)``, which calls ``optimizer.loss(batch)`` and
            ``optimizer.step()``; the same function can serve the run in which the hyperparameters are learned.
        examples: passed on to ``train``, in general a tensor of indices.
        inner: ``inner(model) -> optimizer``, a function that makes the optimizer of the model's weights.
        options: the options of that optimizer that are hyperparameters, as in :class:`BilevelOptimizer`. Those that were
            learned on this ``problem``, or loaded by its BilevelOptimizer, need not be named again: the optimizer has them
            with what was learned, with or without a schedule.
            ``{"lr": None}`` leaves the number of ``inner``.

    Returns:
        The trained model.

    Raises:
        TypeError: an argument of the wrong kind; ``make`` or ``inner`` returned something else.
        ValueError: ``make`` returned the trained model, one that shares with it what is trained, or a copy of it; ``train``
            wrote into a buffer that they share; ``inner`` made another optimizer than the one whose
            options were learned.
        RuntimeError: ``train`` took no step, or moved the hyperparameters; under ``torch.inference_mode()``.

    >>> from hoptim import BilevelOptimizer
    >>> from hoptim.recipes import WeightDecay
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(40, 3), torch.randn(40, 1)
    >>> def loss(model, hparams, batch):
    ...     return (model(x[batch]) - y[batch]).square().mean() + hparams.penalty(model)
    >>> def train(model, optimizer, examples):
    ...     for _ in range(200):
    ...         optimizer.zero_grad()
    ...         optimizer.loss(examples).backward()
    ...         optimizer.step()
    >>> def make():
    ...     return nn.Linear(3, 1)
    >>> def inner(model):
    ...     return torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model = make()
    >>> decay, val = WeightDecay(model, start=0.1), [torch.arange(20, 40)]
    >>> problem = Problem(model, decay, loss)
    >>> optimizer = BilevelOptimizer(inner(model), decay.optimizer(), problem, val_batches=val, every=10, warmup=50)
    >>> train(model, optimizer, torch.arange(20))
    >>> final = retrain(problem, make, train, torch.arange(40), inner=inner)
    >>> bool(loss(final, decay, torch.arange(40)) < loss(model, decay, torch.arange(40)))
    True
    """
    checked_problem(problem)
    check_takes("train", train, "model, optimizer, examples")
    with arguments.gradients("retrain"):
        model = make()
        losses, group = (problem.train_loss, problem.val_loss), problem.process_group
        new = Problem(model, problem.hparams, *losses, has_aux=problem.has_aux, process_group=group)
        _check_new(new.model, problem)
        made = inner(model)
        arguments.check_optimizer("inner", made, new)
        optimizer = TrainingOptimizer(made, new, options=options, learned=problem.options)
        shared = SharedTensors([problem.model, new.model])
        shared.watch(optimizer)
        before = {name: leaf.detach().clone() for name, leaf in problem.leaves().items()}
        train(model, optimizer, examples)
    if not optimizer.inner_steps:
        raise RuntimeError("train took no step: it is called as train(model, optimizer, examples), so step that optimizer")
    if moved := [name for name, leaf in problem.leaves().items() if not torch.equal(leaf, before[name])]:
        raise RuntimeError(f"train moved hyperparameter {moved[0]!r}, which is held fixed here: step only its optimizer")
    shared.check()
    in_loss = before.keys() - {option.name for option in optimizer.learned_options}
    if in_loss and not optimizer._progress.recent.has_seen_backward:
        warnings.warn(
            "no loss of optimizer.loss(batch) went backward in train, so that the new model knows nothing of what was "
            f"learned in train_loss, such as {min(in_loss)!r}: compute the loss with it in place of the criterion",
            stacklevel=2,
        )
    return model


def _check_new(model: nn.Module, problem: Problem) -> None:
    """Raise ``ValueError`` if the model is the trained one, shares a tensor that is trained, or has the trained weights."""
    remedy = "training starts from scratch, so make every layer anew inside make"
    for found in find_shared([problem.model, model]):
        if found.trains:
            raise ValueError(
                f"{found.name!r} of the model that make returned is {found.first!r} of the trained one: {remedy}"
            )
    now, learned = dict(model.named_parameters()), problem.weights()
    if problem.has_trained and all(
        name in now and torch.equal(whole(now[name].detach()), whole(w.detach())) for name, w in learned.items()
    ):
        raise ValueError(f"make returned a copy of the trained model, with its weights: {remedy}")
