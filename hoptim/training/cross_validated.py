"""CrossValidated: learns hyperparameters over folds, then trains a model on everything."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hoptim.linalg.vectors import Tensors
from hoptim.methods.method import Method
from hoptim.problem.functional import switch_to_evaluation
from hoptim.problem.loss_checks import annotate_errors, check_takes
from hoptim.problem.outer_adam import outer_adam
from hoptim.problem.problem import Loss, Problem
from hoptim.problem.random_stream import RandomStream
from hoptim.training import arguments
from hoptim.training.checkpoint import held_weights
from hoptim.training.fit import Fit, LeafAverage
from hoptim.training.fit_file import FitFile
from hoptim.training.fold_optimizer import FoldOptimizer, Train, due_steps
from hoptim.training.folds import make_folds
from hoptim.training.record import Record, natural_values
from hoptim.training.shared_tensors import SharedTensors
from hoptim.training.training_optimizer import TrainingOptimizer


@dataclass(frozen=True, kw_only=True)
class CrossValidatedFit:
    """The result of :meth:`CrossValidated.fit`.

    Attributes:
        model: the model of the last training, on all examples with the learned hyperparameters.
        models: the models of the folds, in their order.
        hyperparameters: the learned natural values, detached, by name; ``hparams`` holds them too.
        history: ``Record.row()`` of each hyperstep.
        cost: the wall-clock time of the whole fit relative to that of the last training, which is a plain one.
    """

    model: nn.Module
    models: list[nn.Module]
    hyperparameters: Tensors
    history: list[dict[str, Any]]
    cost: float

    @torch.no_grad()
    def ensemble(self, *args: Any, of: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> Tensor:
        """The mean of ``of(model(*args, **kwargs))`` over the models of the folds, in evaluation mode.

        Args:
            *args: positional arguments of the models.
            of: a function of the model's output, such as ``lambda z: z.softmax(1)`` for probabilities; default: the output.
            **kwargs: keyword arguments of the models.
        """
        found = []
        for model in self.models:
            with switch_to_evaluation(model):
                output = model(*args, **kwargs)
                found.append(output if of is None else of(output))
        return torch.stack(found).mean(0)


class CrossValidated:
    """Learns hyperparameters by cross-validated hypergradients, then trains a model on everything with them.

    K models are trained on the K folds, in turn, with the same λ. At a hyperstep all of them have done the same share of
    their training, and λ moves along

        (1/K) Σ_k dL_V(k)/dλ,

    where L_V(k) is the validation loss of model k on the examples that its fold holds out. This costs one solve for each
    fold. Then one model is trained on all examples, with the learned λ. In a study (scripts/studies/cross_validation) its
    test loss was below that of every fixed decay on two sets, near the best one on two others, and no better on a small one.

    The training loop is an ordinary one, a function ``train(model, optimizer, examples)``. It is called for each fold, with
    a :class:`BilevelOptimizer` and the indices of the examples to train on, and for the last training, with all indices::

        def train(model, optimizer, examples):
            for _ in range(epochs):
                for batch in examples[torch.randperm(len(examples))].split(100):
                    optimizer.zero_grad()
                    optimizer.loss(batch).backward()
                    optimizer.step()

    Schedulers, a ``DataLoader`` over ``Subset(data, examples)``, clipping, accumulation, autocast and ``GradScaler`` go into
    it as usual. A hyperstep takes place inside ``optimizer.step()``, where each fold waits for the others. For this each has
    its own thread, but only one runs at a time, so that runs repeat to the bit. Each fold draws random numbers from its own
    stream, seeded by ``torch.initial_seed()``. The last training uses the generators of the process, as it would alone.

    If a fit may be interrupted, write the loop as ``for epoch in optimizer.resumable(range(epochs), scheduler):``, and give
    it a file, ``fit(train, checkpoint="fit.pt")``. In several processes, ``make`` wraps the model in
    ``DistributedDataParallel``, each rank runs the same fit, and ``train`` and ``val_batches`` take its share of examples.

    Args:
        make: ``make() -> model``, a function that makes a new model, called once for each fold and once for the last
            training; ``inner``, ``train`` and the result have the model as it was returned, wrapped or not.
        hparams: the hyperparameters, shared by all models.
        train_loss: as in :class:`Problem`.
        val_loss: as in :class:`Problem`.
        has_aux: as in :class:`Problem`.
        inner: ``inner(model) -> optimizer``, a function that makes the optimizer of a model's weights.
        outer: the optimizer of ``hparams.parameters()``; default ``outer_adam(hparams, validation=examples)``.
        examples: the number of examples, without those for testing.
        steps: the number of inner steps that ``train`` takes, or a function of the number of its examples.
        folds: their number, default 3, for equal parts in a random order (that of the first rank); or what a splitter of
            scikit-learn yields, such as ``StratifiedKFold(3).split(x, y)``: pairs of indices, (train, held out). Held-out
            parts may overlap.
        warmup: the share of the steps before hypersteps begin, default 0.25.
        hypersteps: their number, default 25, at equal distances from the warm-up to the end.
        average: whether to take the mean of the leaves over the second half of the hypersteps, the default, or their last
            values.
        options: as in :class:`BilevelOptimizer`.
        hypergradient: as in :class:`BilevelOptimizer`.
        val_batches: ``val_batches(held_out) -> batches``, a function that makes a fold's validation batches, one for each
            hyperstep; default: all that is held out, as one tensor of indices.
        on_failure: if the solve of a fold fails, nothing moves; then ``"skip"`` warns and ``"raise"`` raises an error.
        hooks: functions of the :class:`Record`, called after each hyperstep. The record's result has a leading axis of the
            folds, as for a vector of K validation losses, and its ``standard_error`` is that over the folds.

    Raises:
        TypeError: an argument of the wrong kind; ``make`` or ``inner`` returned something else.
        ValueError: models that share a tensor that is trained; folds that are empty, or train on what they hold out; a
            warm-up that leaves no room for the hypersteps; ranks with different folds.

    Source: Foo, Do and Ng 2007, Efficient multiple hyperparameter learning for log-linear models; the rest is measured.

    >>> import torch
    >>> from torch import nn
    >>> from hoptim.recipes import WeightDecay
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(60, 20)
    >>> y = x[:, :1] + torch.randn(60, 1)
    >>> def loss(model, hparams, batch):
    ...     return (model(x[batch]) - y[batch]).square().mean() + hparams.penalty(model)
    >>> def train(model, optimizer, examples):
    ...     for _ in range(200):
    ...         optimizer.zero_grad()
    ...         optimizer.loss(examples).backward()
    ...         optimizer.step()
    >>> def make():
    ...     return nn.Linear(20, 1)
    >>> def inner(model):
    ...     return torch.optim.SGD(model.parameters(), lr=0.1)
    >>> decay = WeightDecay(make(), start=1e-2)
    >>> found = CrossValidated(make, decay, loss, inner=inner, examples=60, steps=200).fit(train)
    >>> len(found.models), len(found.history), bool(found.hyperparameters["decay.weight"] > 1e-2)
    (3, 25, True)
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        hparams: nn.Module,
        train_loss: Loss,
        val_loss: Loss | None = None,
        *,
        has_aux: bool = False,
        inner: Callable[[nn.Module], Optimizer],
        outer: Optimizer | None = None,
        examples: int,
        steps: int | Callable[[int], int],
        folds: int | Iterable[Any] = 3,
        warmup: float = 0.25,
        hypersteps: int = 25,
        average: bool = True,
        options: Mapping[str, Any] | None = None,
        hypergradient: Method | None = None,
        val_batches: Callable[[Tensor], Iterable[Any]] | None = None,
        on_failure: arguments.OnFailure = "skip",
        hooks: Sequence[Callable[[Record], None]] = (),
    ) -> None:
        arguments.check_fold_schedule(warmup, hypersteps)
        self.hparams, self.average, self._hypersteps = hparams, average, hypersteps

        def problem() -> Problem:
            return Problem(make(), hparams, train_loss, val_loss, has_aux=has_aux)

        whole, optimizers = problem(), []
        self.folds = make_folds(folds, examples, whole.ranks)
        outer = outer_adam(hparams, validation=examples) if outer is None else outer
        with arguments.gradients("CrossValidated"):
            for number, fold in enumerate(self.folds, 1):
                stream = RandomStream(f"fold {number}")
                with annotate_errors(f"for fold {number}"):
                    with stream.drawing():
                        one = problem()
                    optimizers.append(
                        FoldOptimizer(
                            inner(one.wrapper),
                            outer,
                            one,
                            name=f"fold {number} of {len(self.folds)}",
                            fold=fold,
                            stream=stream,
                            due=due_steps(steps(len(fold.train)) if callable(steps) else steps, warmup, hypersteps),
                            val_batches=[fold.held_out] if val_batches is None else val_batches(fold.held_out),
                            options=options,
                            hypergradient=hypergradient,
                            on_failure=on_failure,
                            hooks=hooks,  # only the first one calls them, for all
                        )
                    )
            shared = SharedTensors([whole.model, *(optimizer.problem.model for optimizer in optimizers)])
            last = TrainingOptimizer(inner(whole.wrapper), whole, options=options)
        self._fit = Fit(optimizers, last, torch.arange(examples, device="cpu"), shared)

    def fit(
        self, train: Train, *, checkpoint: str | os.PathLike[str] | None = None, every_seconds: float = 60.0
    ) -> CrossValidatedFit:
        """Learn the hyperparameters on the folds, then train a model on all examples with them.

        Args:
            train: the training loop, ``train(model, optimizer, examples)``, with the indices of the examples to train on.
            checkpoint: a file; if it exists, the fit resumes from it, to the same bits. It is written between the folds and
                the last training, and in both at the marks of ``optimizer.resumable``. It stays when the fit is over. After
                a resume, hooks see the hypersteps since the last checkpoint again. Default: none.
            every_seconds: the least time from one writing to the next, default 60.

        Raises:
            RuntimeError: it was called before, or under ``torch.inference_mode()``; or a solve failed and ``on_failure`` is
                ``"raise"``.
            ValueError: a fold's training ended before the first hyperstep, or wrote into a buffer that the models share; the
                checkpoint is damaged or of another fit.
            UnpicklingError: the state of an object given to ``resumable`` has other things than tensors and plain values.
        """
        check_takes("train", train, "model, optimizer, examples")
        fit, problem = self._fit, self._fit.last.problem
        if fit.has_begun:
            raise RuntimeError("fit was called before: its models are trained now, so make a new CrossValidated")
        file = None if checkpoint is None else FitFile(checkpoint, every_seconds, self._settings(), problem.ranks)
        average = LeafAverage(problem, skip=self._hypersteps // 2) if self.average else None
        with arguments.gradients("fit"):
            fit.run(train, average, file)
        return CrossValidatedFit(
            model=problem.wrapper,
            models=[one.problem.wrapper for one in fit.folds],
            hyperparameters=natural_values(problem),
            history=fit.history,
            cost=sum(fit.seconds.values()) / fit.seconds["last"],
        )

    def _settings(self) -> dict[str, Any]:
        """The settings that a resumed fit has to share with the saved one."""
        optimizers, first = self._fit.folds, self._fit.folds[0]
        return {
            "examples": len(self._fit.examples),
            "folds": [(fold.train.tolist(), fold.held_out.tolist()) for fold in self.folds],
            "hypersteps": self._hypersteps,
            "average": self.average,
            "the steps of the hypersteps": [list(optimizer.due) for optimizer in optimizers],
            "hypergradient": re.sub(" at 0x[0-9a-f]+", "", repr(first.hypergradient)),
            "the inner optimizer": type(first.inner).__name__,
            "the outer optimizer": type(first.outer).__name__,
            "weights": held_weights(first.inner, first.problem),
            "hyperparameters": [(name, list(leaf.shape)) for name, leaf in first.problem.leaves().items()],
        }
