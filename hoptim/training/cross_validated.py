"""CrossValidated: hyperparameters learned over folds, and one last training on everything."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hoptim.linalg.vectors import Tree
from hoptim.methods.method import Method
from hoptim.problem.hyperparameters import HyperParameters, outer_adam
from hoptim.problem.loss_checks import annotate_errors, check_takes
from hoptim.problem.problem import Loss, Problem
from hoptim.problem.random_stream import RandomStream
from hoptim.training import arguments
from hoptim.training.fold_optimizer import FoldOptimizer, Met, due_steps, joined
from hoptim.training.folds import Fold, make_folds
from hoptim.training.in_turn import InTurn
from hoptim.training.optimizer import BilevelOptimizer
from hoptim.training.record import Record, natural_values
from hoptim.validation import describe_type

Train = Callable[[nn.Module, BilevelOptimizer, Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class CrossValidatedFit:
    """What :meth:`CrossValidated.fit` found.

    Attributes:
        model: the model of the last training, on all examples with the learned hyperparameters.
        models: the models of the folds, in their order; the mean of their predictions is an ensemble.
        hyperparameters: the learned natural values, detached, by name; ``hparams`` holds them too.
        history: ``Record.row()`` of each hyperstep.
        cost: the wall-clock time of all of it, over that of the last training, which is a plain one.
    """

    model: nn.Module
    models: list[nn.Module]
    hyperparameters: Tree
    history: list[dict[str, Any]]
    cost: float


class CrossValidated:
    """Learns hyperparameters by cross-validated hypergradients, then trains a model on everything with them.

    K models are trained on the K folds, in turn, with the same λ. At each hyperstep all have come as far, and λ moves along

        (1/K) Σ_k dL_V(k)/dλ,

    where L_V(k) is the validation loss of model k on the examples that its fold holds out. It costs one solve a fold. Then
    one model is trained on all examples, with the learned λ. In our study this was better on a test set than every fixed
    decay on digits, near the best one on two other sets (scripts/README.md).

    The training loop is an ordinary one, a function ``train(model, optimizer, examples)``. It is called for each fold, with
    a :class:`BilevelOptimizer` and the indices of the examples to train on, and for the last training, with all indices::

        def train(model, optimizer, examples):
            for _ in range(epochs):
                for batch in examples[torch.randperm(len(examples))].split(100):
                    optimizer.zero_grad()
                    optimizer.loss(batch).backward()
                    optimizer.step()

    Schedulers, a ``DataLoader`` over ``Subset(data, examples)``, clipping, accumulation and autocast go into it as usual.
    A hyperstep takes place inside ``optimizer.step()``, where each fold waits for the others. For that each has a thread of
    its own, but only one runs at a time, so that runs repeat to the bit. Each fold draws random numbers from a stream of its
    own, seeded by ``torch.initial_seed()``. The last training draws from the process's, as it would alone. A fit can't be
    resumed from a checkpoint, and is for one process.

    Args:
        make: ``make() -> model``, a function that makes a new model, called once a fold and once for the last training.
        hparams: the hyperparameters, shared by all.
        train_loss: as in :class:`Problem`.
        val_loss: as in :class:`Problem`.
        inner: ``inner(model) -> optimizer``, a function that makes the optimizer of a model's weights.
        outer: the optimizer of ``hparams.parameters()``; default Adam at the rates of :meth:`HyperParameters.optimizer`, and
            0.05 for other modules. What is ``positive`` changes in 60 hypersteps by a factor of 20 at most; at 0.1, by 400.
        examples: how many examples there are, all but those that are kept for testing.
        steps: how many inner steps ``train`` takes; where that depends on the number n of its examples, a function of n.
        folds: their number, default 3; or what a splitter of scikit-learn yields, such as
            ``StratifiedKFold(3).split(x, y)``: pairs of indices, (train, held out). Parts that are held out may overlap.
        warmup: the share of the steps before hypersteps begin, default 0.25.
        hypersteps: how many there are, default 60, in equal distances from the warm-up to the end.
        average: whether the learned leaves are the mean over the second half of the hypersteps, the default, or the last.
        hypergradient: as in :class:`BilevelOptimizer`.
        val_batches: ``val_batches(held_out) -> batches``, a function that makes a fold's validation batches, one of which is
            used in a hyperstep; default: all that is held out, as one tensor of indices.
        on_failure: after a failed solve of any fold, which moves nothing: ``"skip"`` warns, ``"raise"`` raises an error.
        hooks: functions of the :class:`Record`, called after each hyperstep. Its result has a leading axis of the folds, as
            for a vector of K validation losses, and its ``standard_error`` is that over the folds.

    Raises:
        TypeError: an argument of the wrong kind; ``make`` or ``inner`` returned something else.
        ValueError: models that share a tensor; folds that are empty, or train on what they hold out; a warm-up that leaves
            no room for the hypersteps.

    Source: Foo, Do and Ng 2007, Efficient multiple hyperparameter learning for log-linear models; the rest is measured.

    >>> import torch
    >>> from torch import nn
    >>> from hoptim.recipes import WeightDecay
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(60, 20)
    >>> y = x[:, :1] + torch.randn(60, 1)
    >>> def val_loss(model, hparams, batch):
    ...     return (model(x[batch]) - y[batch]).square().mean()
    >>> def train_loss(model, hparams, batch):
    ...     return val_loss(model, hparams, batch) + hparams.penalty(model)
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
    >>> found = CrossValidated(make, decay, train_loss, val_loss, inner=inner, examples=60, steps=200).fit(train)
    >>> len(found.models), len(found.history), bool(found.hyperparameters["decay.weight"] > 1e-2)
    (3, 60, True)
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        hparams: nn.Module,
        train_loss: Loss,
        val_loss: Loss,
        *,
        inner: Callable[[nn.Module], Optimizer],
        outer: Optimizer | None = None,
        examples: int,
        steps: int | Callable[[int], int],
        folds: int | Iterable[Any] = 3,
        warmup: float = 0.25,
        hypersteps: int = 60,
        average: bool = True,
        hypergradient: Method | None = None,
        val_batches: Callable[[Tensor], Iterable[Any]] | None = None,
        on_failure: arguments.OnFailure = "skip",
        hooks: Sequence[Callable[[Record], None]] = (),
    ) -> None:
        arguments.check_functions(make, inner, val_batches)
        arguments.check_fold_schedule(warmup, hypersteps)
        if not isinstance(hparams, nn.Module):
            raise TypeError(f"hparams is {describe_type(hparams)}: give a HyperParameters or another nn.Module")
        self.folds, self.hparams, self.average, self._fitted = make_folds(folds, examples), hparams, average, False
        self._examples, self._hypersteps = torch.arange(examples, device="cpu"), hypersteps
        self._streams = [RandomStream(f"fold {number}") for number, _ in enumerate(self.folds, 1)]

        def problem() -> Problem:
            model = make()
            if not isinstance(model, nn.Module):
                raise TypeError(f"make returned {describe_type(model)}: return an nn.Module")
            return Problem(model, hparams, train_loss, val_loss)

        problems = [problem()]
        for stream in self._streams:
            with stream.drawing():
                problems.append(problem())
        arguments.check_models(problems)
        outer = outer_adam(hparams) if outer is None else outer

        def fold_optimizer(fold: Fold, problem: Problem) -> FoldOptimizer:
            return FoldOptimizer(
                inner(problem.model),
                outer,
                problem,
                due=due_steps(arguments.checked_steps(steps, len(fold.train)), warmup, hypersteps),
                val_batches=[fold.held_out] if val_batches is None else val_batches(fold.held_out),
                hypergradient=hypergradient,
                on_failure=on_failure,
                hooks=hooks,  # which are called by the first one, for all
            )

        self._optimizers: list[FoldOptimizer] = []
        for number, (fold, one) in enumerate(zip(self.folds, problems[1:], strict=True), 1):
            with annotate_errors(f"for fold {number}"):
                self._optimizers.append(fold_optimizer(fold, one))
        everything = [self._examples]  # which no hyperstep draws
        self._last = BilevelOptimizer(inner(problems[0].model), outer, problems[0], val_batches=everything, every=None)

    def fit(self, train: Train) -> CrossValidatedFit:
        """Learn the hyperparameters on the folds, then train a model on all examples with them.

        Args:
            train: the training loop, ``train(model, optimizer, examples)``, with the indices of the examples to train on.

        Raises:
            RuntimeError: it is called again; or a solve failed and ``on_failure`` is ``"raise"``.
            ValueError: a fold's training ended before the first hyperstep.
        """
        check_takes("train", train, "model, optimizer, examples")
        if self._fitted:
            raise RuntimeError("fit was called before: its models are trained now, so make a new CrossValidated")
        self._fitted = True
        history: list[dict[str, Any]] = []
        begun = time.perf_counter()
        turns = [InTurn(self._training(number, train)) for number, _ in enumerate(self.folds)]
        try:
            self._train_folds(turns, history)
        finally:
            for turn in turns:
                turn.close()
        last_begun = time.perf_counter()
        train(self._last.problem.model, self._last, self._examples)
        ended = time.perf_counter()
        return CrossValidatedFit(
            model=self._last.problem.model,
            models=[optimizer.problem.model for optimizer in self._optimizers],
            hyperparameters=natural_values(self._last.problem),
            history=history,
            cost=(ended - begun) / (ended - last_begun),
        )

    def _training(self, number: int, train: Train) -> Callable[[], None]:
        """The training of a fold."""
        optimizer = self._optimizers[number]

        def training() -> None:
            with annotate_errors(f"in the training of fold {number + 1} of {len(self.folds)}"):
                train(optimizer.problem.model, optimizer, self.folds[number].train.clone())

        return training

    def _train_folds(self, turns: list[InTurn], history: list[dict[str, Any]]) -> None:
        """Train all folds from one hyperstep to the next, until a training has ended; then the others to their end."""
        learned = _Average(self._last.problem, skip=self._hypersteps // 2)
        for optimizer, turn in zip(self._optimizers, turns, strict=True):
            optimizer.turn = turn
        record: Record | None = None
        while True:
            met = []
            for stream, turn in zip(self._streams, turns, strict=True):
                with stream.drawing():
                    met.append(turn.resume(record))
            if any(turn.ended for turn in turns):
                break
            record = self._meet(met)
            history.append(record.row())
            learned.add()
        for stream, turn, optimizer in zip(self._streams, turns, self._optimizers, strict=True):
            optimizer.due = ()
            while not turn.ended:
                with stream.drawing():
                    turn.resume()
        self._check_lengths(len(history))
        if self.average:
            learned.put()

    def _meet(self, met: list[Met]) -> Record:
        """The hyperstep of all folds, taken by the first one's optimizer."""
        seconds = sum(seconds for _, seconds in met)
        return self._optimizers[0]._move(time.perf_counter() - seconds, joined(met))

    def _check_lengths(self, hypersteps: int) -> None:
        """Each fold took as many steps as it was said to take."""
        for number, optimizer in enumerate(self._optimizers, 1):
            taken, told = optimizer.inner_steps, optimizer.steps
            if abs(taken - told) > 0.02 * told:
                words = f"the training of fold {number} took {taken} steps, where steps says {told}"
                if not hypersteps:
                    raise ValueError(f"{words}: it ended before the first hyperstep. Give steps as they are")
                warnings.warn(f"{words}, so that {hypersteps} hypersteps were not spread over all of it", stacklevel=4)
                return


class _Average:
    """The mean of the leaves over the hypersteps after the first ``skip``."""

    def __init__(self, problem: Problem, skip: int) -> None:
        self._problem, self._skip, self._seen = problem, skip, 0
        self._mean: Tree = {}

    def add(self) -> None:
        """Another hyperstep has come."""
        self._seen += 1
        count = self._seen - self._skip
        if count < 1:
            return
        for name, leaf in self._problem.leaves().items():
            value = leaf.detach().clone()
            self._mean[name] = value if count == 1 else self._mean[name].lerp(value, 1 / count)

    @torch.no_grad()
    def put(self) -> None:
        """Set the leaves to it, if there was any."""
        for name, value in self._mean.items():
            self._problem.leaves()[name].copy_(value)
        for module in self._problem.hparams.modules():
            if isinstance(module, HyperParameters):
                module.project_()
