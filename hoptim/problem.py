"""Problem: a model, hyperparameters and two ordinary losses, as pure functions of (weights, hyperparameters, batch)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hoptim.trees import Tree

Loss = Callable[[Any, Any, Any], Tensor]
LossName = Literal["train_loss", "val_loss"]
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A training loss at one point, taken apart: L_T = criterion(z) + penalty."""

    z: Tensor
    criterion: Callable[[Tensor], Tensor]
    penalty: Tensor | None


@dataclass(frozen=True)
class CompositeLoss:
    """A loss that also shows its parts: L(w, λ) = criterion(predict(w), λ) + penalty(w, λ). ``GaussNewton`` needs them.

    Args:
        predict: z = ``predict(model, batch)``, a tensor of any shape: the model's output for the batch.
        criterion: ``criterion(z, hparams, batch) -> scalar``, convex in z for a positive semidefinite curvature.
        penalty: ``penalty(model, hparams) -> scalar``; ``None`` for none.

    Raises:
        TypeError: a part can't be called; when called, ``predict`` returned no tensor.

    >>> loss = CompositeLoss(lambda model, x: model(x), lambda z, hparams, x: z.square().mean())
    >>> loss(nn.Identity(), None, torch.tensor([3.0, 4.0]))
    tensor(12.5000)
    """

    predict: Callable[[Any, Any], Tensor]
    criterion: Callable[[Tensor, Any, Any], Tensor]
    penalty: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("predict", "criterion", "penalty"):
            part = getattr(self, name)
            if not callable(part) and not (name == "penalty" and part is None):
                raise TypeError(f"{name} is a {type(part).__name__}: give a function")

    def __call__(self, model: Any, hparams: Any, batch: Any) -> Tensor:
        """The loss, as any other."""
        return self.total(self.parts(model, hparams, batch))

    def parts(self, model: Any, hparams: Any, batch: Any) -> Parts:
        """z, the criterion as a function of z alone, and the penalty's value."""
        z = self.predict(model, batch)
        if not isinstance(z, Tensor):
            raise TypeError(f"predict returned a {type(z).__name__}: return one tensor, such as the logits")
        penalty = None if self.penalty is None else scalar("penalty", self.penalty(model, hparams), needs_gradient=False)
        return Parts(z=z, criterion=lambda z: self.criterion(z, hparams, batch), penalty=penalty)

    @staticmethod
    def total(parts: Parts) -> Tensor:
        """The loss from its parts."""
        value = parts.criterion(parts.z)
        return value if parts.penalty is None else value + parts.penalty


class _Joint(nn.Module):
    """One module that holds both, so that one ``functional_call`` replaces the tensors of both."""

    def __init__(self, model: nn.Module, hparams: nn.Module) -> None:
        super().__init__()
        self.model, self.hparams = model, hparams

    def forward(self, run: Callable[[nn.Module, nn.Module, Any], R], batch: Any) -> R:
        return run(self.model, self.hparams, batch)


class Problem:
    """A bilevel problem: min over λ of L_V(λ, w*(λ)), where w*(λ) minimises L_T(w, λ).

    Args:
        model: any ``nn.Module``; its weights w are those with ``requires_grad``. Tied weights count once.
        hparams: the hyperparameters λ: a :class:`HyperParameters`, or any other ``nn.Module``.
        train_loss: L_T as ``train_loss(model, hparams, batch) -> scalar``: ordinary PyTorch, ``model(x)``,
            ``model.named_parameters()``, ``hparams["weight_decay"]``.
        val_loss: L_V, likewise. It may call ``model.eval()``: the mode is restored after each call. It may return a vector
            of R losses (tasks, groups, folds): each then gets a hypergradient of its own.

    Raises:
        TypeError: ``model`` or ``hparams`` is no module, or a loss can't be called.
        ValueError: there is no weight or no hyperparameter to learn, or a tensor is both.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590).

    >>> model = nn.Linear(2, 1, bias=False)
    >>> hparams = nn.ParameterDict({"decay": torch.tensor(0.1)})
    >>> def train_loss(model, hparams, batch):
    ...     return (model(batch) ** 2).mean() + hparams["decay"] * (model.weight**2).sum()
    >>> problem = Problem(model, hparams, train_loss, lambda model, hparams, batch: (model(batch) ** 2).mean())
    >>> list(problem.weights()), list(problem.leaves())
    (['weight'], ['decay'])
    """

    def __init__(self, model: nn.Module, hparams: nn.Module, train_loss: Loss, val_loss: Loss) -> None:
        for name, module in (("model", model), ("hparams", hparams)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is a {type(module).__name__}: give an nn.Module")
        for name, loss in (("train_loss", train_loss), ("val_loss", val_loss)):
            if not callable(loss):
                raise TypeError(f"{name} is a {type(loss).__name__}: give a function of (model, hparams, batch)")
        self.model, self.hparams, self.train_loss, self.val_loss = model, hparams, train_loss, val_loss
        self._joint = _Joint(model, hparams)
        if not self.weights():
            raise ValueError("no weight of the model requires a gradient: nothing is trained")
        if not self.leaves():
            raise ValueError("no parameter of hparams requires a gradient: there is nothing to learn")
        weights = {id(p): name for name, p in model.named_parameters()}
        if both := [(weights[id(p)], name) for name, p in hparams.named_parameters() if id(p) in weights]:
            raise ValueError(f"weight {both[0][0]!r} and hyperparameter {both[0][1]!r} are the same tensor: part them")
        self._twin = _detached_twin(hparams)

    def weights(self) -> Tree:
        """The live weights w that require a gradient, by the model's names."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def leaves(self) -> Tree:
        """The live unconstrained hyperparameters that require a gradient, by the names of ``hparams``."""
        return {name: p for name, p in self.hparams.named_parameters() if p.requires_grad}

    def loss(self, batch: Any) -> Tensor:
        """L_T on the live model, for the inner step: hyperparameters are constants here, and pay nothing.

        They reach the loss through a persistent twin of ``hparams`` whose leaves are detached views of the same memory:
        switching ``requires_grad`` instead would break activation checkpointing, which runs the loss a second time.
        """
        if not _in_step(self.hparams, self._twin):
            self._twin = _detached_twin(self.hparams)
        return scalar("train_loss", self.train_loss(self.model, self._twin, batch))

    def pure(self, name: LossName, weights: Tree, leaves: Tree, batch: Any, then: Callable[[Tensor, Parts | None], R]) -> R:
        """``then`` of the named loss, and of its parts where it shows them, as a pure function of the tensors given.

        Buffers are clones, and the modes are put back. Backward passes belong inside ``then``: activation checkpointing
        runs the model again during one, and has to find the same tensors, buffers and modes.
        """
        loss: Loss = getattr(self, name)

        def run(model: nn.Module, hparams: nn.Module, batch: Any) -> R:
            check = losses if name == "val_loss" else scalar
            if not isinstance(loss, CompositeLoss):
                return then(check(name, loss(model, hparams, batch)), None)
            parts = loss.parts(model, hparams, batch)
            return then(check(name, loss.total(parts)), parts)

        path = {id(p): path for path, p in self._joint.named_parameters()}
        given = {path[id(p)]: weights[key] for key, p in self.model.named_parameters() if key in weights}
        given |= {path[id(p)]: leaves[key] for key, p in self.hparams.named_parameters() if key in leaves}
        given |= {key: buffer.clone() for key, buffer in self._joint.named_buffers()}
        with _modes_restored(self._joint):
            return functional_call(self._joint, given, (run, batch), tie_weights=True)

    def generators(self) -> dict[str, Tensor]:
        """The states of the random generators that a loss may draw from, by device."""
        states = {"cpu": torch.get_rng_state()}
        for device in {str(p.device) for p in (*self.weights().values(), *self.leaves().values()) if p.is_cuda}:
            states[device] = torch.cuda.get_rng_state(device)
        return states

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """What runs inside draws from a copy of the generators' states, with gradients enabled and attention unfused.

        So the masks of a hyperstep's training loss are those of the next training step. Fused attention has no double
        backward: the plain kernel serves inside, the user's own choice outside.
        """
        devices = {t.device for t in (*self.weights().values(), *self.leaves().values()) if t.device.type == "cuda"}
        forked = torch.random.fork_rng(devices=sorted(devices, key=str))
        with forked, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Put the random generators into these states."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state.cpu())
        else:
            torch.cuda.set_rng_state(state.cpu(), device)


def scalar(name: str, value: Tensor, needs_gradient: bool = True) -> Tensor:
    """Return ``value`` if it is a scalar with a gradient; raise and say what to do if not."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} returned a {type(value).__name__}: return a scalar tensor")
    if value.ndim:
        raise ValueError(f"{name} returned a tensor of shape {tuple(value.shape)}: return a scalar, such as its mean()")
    if needs_gradient and not value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} returned a loss without a gradient: is it computed under no_grad() or detach()ed?")
    return value


def losses(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a scalar, or a vector of one loss or more, with a gradient; raise if not."""
    if not isinstance(value, Tensor) or not value.ndim:
        return scalar(name, value)
    if value.ndim > 1 or not len(value):
        raise ValueError(f"{name} returned a tensor of shape {tuple(value.shape)}: return a scalar, or a vector of losses")
    scalar(f"an entry of {name}", value[0])
    return value


def _detached_twin(hparams: nn.Module) -> nn.Module:
    """A copy whose parameters are views of the same memory that require no gradient, and whose buffers are the same."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in hparams.parameters()}
    memo |= {id(buffer): buffer for buffer in hparams.buffers()}
    return copy.deepcopy(hparams, memo)


def _in_step(hparams: nn.Module, twin: nn.Module) -> bool:
    """Give the twin the modes, buffers and plain attributes of ``hparams``; say whether it still is its image."""
    if [name for name, _ in hparams.named_modules()] != [name for name, _ in twin.named_modules()]:
        return False
    for module, other in zip(hparams.modules(), twin.modules(), strict=True):
        other._buffers = module._buffers
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, Tensor))}
        other.__dict__.update(plain)
        for name, p in module._parameters.items():
            q = other._parameters.get(name)
            if p is not None and (q is None or p.data_ptr() != q.data_ptr() or p.dtype != q.dtype):
                return False
    return True


@contextmanager
def _modes_restored(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            if part.training is not training:
                part.training = training
