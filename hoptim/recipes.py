"""Recipes: hyperparameters that come ready for use, with the losses' terms that they are for.

A recipe is a :class:`HyperParameters` that knows the model. It goes where ``hparams`` goes, alone or in an
``nn.ModuleDict`` beside others:

>>> hparams = nn.ModuleDict({"decay": WeightDecay(nn.Linear(2, 3)), "rest": HyperParameters({"shift": torch.zeros(3)})})
>>> [name for name, _ in hparams.named_parameters()]
['decay.decay.weight', 'rest.shift']
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.loss_checks import check_real
from hoptim.problem.wrappers import unwrap
from hoptim.validation import describe_type, is_finite

Per = Literal["global", "tensor", "channel", "weight"]


class WeightDecay(HyperParameters):
    """Learned weight decays, and their penalty ½ Σ_k λ_k ‖w_k‖², whose gradient is λ_k w_k.

    Each λ_k is positive and its leaf is log λ_k, so that Adam at a rate of 0.05, which is :meth:`optimizer`, changes it by
    about 5 % a step. Set the inner optimizer's own ``weight_decay`` to 0.

    The decayed weights are those that require a gradient and have at least two axes. So biases and norms are left out, also
    a ``LayerNorm`` or ``RMSNorm`` over several axes; embeddings are decayed. A tied weight counts once. A weight that is
    unfrozen later has no decay, which a warning tells once. Names are those of the model inside its wrappers: the decay of
    the weight ``"0.weight"`` is ``hparams["decay.0.weight"]``, a global one ``hparams["decay"]``. Decays have their weight's
    device, and float32 or more.

    Args:
        model: the model, before or after it is wrapped. Move it to its device first.
        per: what has a λ of its own: all weights together (``"global"``, shape ()), each tensor (shape ()), each output
            channel of a tensor, which is its first axis (shape (n,)), or each weight (the tensor's shape).
        start: λ at the start, positive.
        norm: 2 for ½ Σ λ_k ‖w_k‖²; 1 for Σ λ_k |w_k|, which has no curvature of its own.
        include: ``include(name, weight) -> bool`` says which weights that require a gradient are decayed, in place of the
            rule above.

    Raises:
        TypeError: ``model`` is no module, or a weight is complex.
        ValueError: ``per``, ``start`` or ``norm`` is none of these, no weight is left to decay, or one has no values yet.

    Source: Krogh and Hertz 1991, A simple weight decay can improve generalization.

    >>> from hoptim import BilevelOptimizer, Problem
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(40, 4), torch.arange(40) % 3
    >>> def val_loss(model, hparams, batch):
    ...     return nn.functional.cross_entropy(model(x[batch]), y[batch])
    >>> def train_loss(model, hparams, batch):
    ...     return val_loss(model, hparams, batch) + hparams.penalty(model)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    >>> decay = WeightDecay(model, per="tensor", start=1e-2)
    >>> decay
    WeightDecay(per='tensor', norm=2): 2 decays of 56 weights in 2 tensors, from 0.01 to 0.01
    >>> inner, problem = torch.optim.SGD(model.parameters(), lr=0.1), Problem(model, decay, train_loss, val_loss)
    >>> val = [torch.arange(20, 40)]
    >>> optimizer = BilevelOptimizer(inner, decay.optimizer(), problem, val_batches=val, every=10, warmup=100)
    >>> for _ in range(300):
    ...     optimizer.zero_grad()
    ...     optimizer.loss(torch.arange(20)).backward()
    ...     optimizer.step()
    >>> decay                                                           # the labels are noise, so decays grow
    WeightDecay(per='tensor', norm=2): 2 decays of 56 weights in 2 tensors, from 0.0185 to 0.0291
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        per: Per = "tensor",
        start: float = 1e-4,
        norm: Literal[1, 2] = 2,
        include: Callable[[str, nn.Parameter], bool] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {describe_type(model)}: give an nn.Module")
        if per not in get_args(Per):
            raise ValueError(f"per is {per!r}: give one of {', '.join(map(repr, get_args(Per)))}")
        if norm not in (1, 2):
            raise ValueError(f"norm is {norm!r}: give 2 for ½ Σ λ‖w‖², or 1 for Σ λ|w|")
        if not is_finite(start) or start <= 0:
            raise ValueError(f"start is {start!r}: a decay is learned on a log scale, so start at a positive number")
        inside = unwrap(model)
        check_real("weight", inside.named_parameters())
        decayed = include or _usual(inside)
        usable = {name: p for name, p in inside.named_parameters() if decayed(name, p)}
        weights = {name: p for name, p in usable.items() if p.requires_grad}
        if not weights:
            raise ValueError(
                "the model has no weight to decay: none requires a gradient and has at least two axes; see include"
            )
        values = {"decay": _full((), start, next(iter(weights.values())))}
        if per != "global":
            axes = {"tensor": 0, "channel": 1, "weight": None}[per]
            values = {f"decay.{name}": _full(p.shape[:axes], start, p) for name, p in weights.items()}
        super().__init__(values, dict.fromkeys(values, constraints.positive))
        self.per, self.norm = per, norm
        self._shapes = {name: p.shape for name, p in weights.items()}
        self._frozen = [name for name in usable if name not in weights]  # emptied when one of them has been told of

    @property
    def degrees_of_freedom(self) -> int:
        """How many numbers are learned."""
        return sum(leaf.numel() for leaf in self.parameters())

    def penalty(self, model: Any) -> Tensor:
        """½ Σ_k λ_k ‖w_k‖², or Σ_k λ_k |w_k|, of the model's weights as they are now: a scalar for the training loss.

        Args:
            model: the model that the loss is given.

        Raises:
            ValueError: a decayed weight is missing in ``model``, or has another shape.
        """
        weights = dict(unwrap(model).named_parameters())
        self._warn_of_unfrozen(weights)
        together = self["decay"] if self.per == "global" else None
        terms = []
        for name, shape in self._shapes.items():
            found = weights.get(name)
            if found is None or found.shape != shape:
                now = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise ValueError(
                    f"weight {name!r} had shape {tuple(shape)} when WeightDecay was made, and is {now} in this model: "
                    "give penalty the same model, and make WeightDecay after the model has its final layers"
                )
            decay = self[f"decay.{name}"] if together is None else together
            w = found.to(decay.dtype)
            size = w * w if self.norm == 2 else w.abs()
            if decay.ndim < w.ndim:
                size = size.sum(dim=tuple(range(decay.ndim, w.ndim)))
            terms.append((decay * size).sum())
        total = torch.stack(terms).sum()
        return total / 2 if self.norm == 2 else total

    def _warn_of_unfrozen(self, weights: dict[str, nn.Parameter]) -> None:
        unfrozen = [name for name in self._frozen if name in weights and weights[name].requires_grad]
        if not unfrozen:
            return
        self._frozen.clear()
        warnings.warn(
            f"weights that were frozen when WeightDecay was made train now without a decay: {unfrozen[0]!r} and "
            f"{len(unfrozen) - 1} more. Make WeightDecay, and what is built on it, with these unfrozen, or leave them out "
            "with include",
            stacklevel=3,
        )

    def __repr__(self) -> str:
        values = torch.cat([self[name].detach().flatten() for name in self])
        count = sum(shape.numel() for shape in self._shapes.values())
        return (
            f"WeightDecay(per={self.per!r}, norm={self.norm}): {self.degrees_of_freedom} decays of {count} weights in "
            f"{len(self._shapes)} tensors, from {values.min():.3g} to {values.max():.3g}"
        )


class LabelSmoothing(HyperParameters):
    """A learned label smoothing ε in (0, 1), and its cross-entropy (1 − ε)·(−log p_y) + ε/K · Σ_k (−log p_k).

    It is ``torch.nn.functional.cross_entropy(..., label_smoothing=ε)``, which takes ε as a number, in which there is no
    derivative.

    Args:
        start: ε at the start.

    Raises:
        ValueError: ``start`` is not between 0 and 1.

    Source: Szegedy et al. 2016 (arXiv 1512.00567), section 7.

    >>> hparams = LabelSmoothing(start=0.1)
    >>> z, y = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    >>> [round(x.item(), 4) for x in (hparams.cross_entropy(z, y), nn.functional.cross_entropy(z, y, label_smoothing=0.1))]
    [0.3365, 0.3365]
    """

    def __init__(self, start: float = 0.05) -> None:
        if not (is_finite(start) and 0 < start < 1):
            raise ValueError(f"start is {start!r}: give a number between 0 and 1")
        super().__init__({"smoothing": torch.tensor(float(start))}, {"smoothing": constraints.unit_interval})

    def cross_entropy(self, z: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of logits z, of shape (N, K, …) with classes as ``target``, of shape (N, …); ``reduction`` as torch's."""
        own = nn.functional.cross_entropy(z, target, reduction=reduction)
        others = nn.functional.cross_entropy(z, torch.full_like(z, 1 / z.shape[1]), reduction=reduction)
        return own + self["smoothing"].to(z.dtype) * (others - own)


class NoiseWidth(HyperParameters):
    """Learned widths σ in (0, 1) of Gaussian noise that is added to the input of layers while they train: x + σ·ξ.

    No line of the model changes: its layers are found by name, and get their noise while :meth:`call` runs the model. A
    layer in evaluation mode gets none.

    Args:
        model: the model, before or after it is wrapped.
        layers: the names of the layers, such as ``"blocks.0.mlp"``; ``None``, the default, for each that has a weight of
            at least two axes and is no embedding.
        start: σ at the start.

    Raises:
        TypeError: ``model`` is no module; when called, the input of a layer is no tensor of real numbers.
        ValueError: a layer is not there, none is left, or ``start`` is not between 0 and 1.

    Source: Bishop 1995, Training with noise is equivalent to Tikhonov regularization.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> hparams = NoiseWidth(model, start=0.1)
    >>> list(hparams)
    ['width.0', 'width.2']
    >>> x = torch.zeros(2, 4)
    >>> torch.equal(hparams.call(model, x), model(x)), torch.equal(hparams.call(model.eval(), x), model(x))
    (False, True)
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None = None, *, start: float = 0.1) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {describe_type(model)}: give an nn.Module")
        if not (is_finite(start) and 0 < start < 1):
            raise ValueError(f"start is {start!r}: give a number between 0 and 1")
        parts = dict(unwrap(model).named_modules())
        if layers is None:
            layers = [name for name, part in parts.items() if _is_matrix(part)]
        if strangers := [name for name in layers if name not in parts or not name]:
            raise ValueError(f"the model has no layer {strangers[0]!r}: its layers are {[name for name in parts if name]}")
        if not layers:
            raise ValueError("no layer is given, and the model has none with a weight of two axes: name layers")
        like = next(unwrap(model).parameters(), torch.zeros(()))
        values = {f"width.{name}": _full((), start, like) for name in layers}
        super().__init__(values, dict.fromkeys(values, constraints.unit_interval))
        self.layers = tuple(layers)

    def call(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``, with noise at the inputs of its layers where they are in training mode."""
        parts = dict(unwrap(model).named_modules())
        if missing := [name for name in self.layers if name not in parts]:
            raise ValueError(f"this model has no layer {missing[0]!r}, which NoiseWidth was made for: give the same model")
        handles = [parts[name].register_forward_pre_hook(partial(self._with_noise, name)) for name in self.layers]
        try:
            return model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _with_noise(self, name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if not layer.training:
            return None
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"layer {name!r} gets {describe_type(x)}, to which no noise can be added: leave it out of layers"
            )
        return x + self[f"width.{name}"].to(x.dtype) * torch.randn_like(x), *inputs[1:]


def _is_matrix(part: nn.Module) -> bool:
    weight = part._parameters.get("weight")
    return weight is not None and weight.ndim >= 2 and not isinstance(part, (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm))


def _usual(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """The rule that leaves out biases and norms. The other norms' weights have one axis."""
    norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))]
    scales = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    return lambda _, p: p.ndim >= 2 and id(p) not in scales


def _full(shape: tuple[int, ...], value: float, like: Tensor) -> Tensor:
    """A start on the device of ``like``, in float32 or more: a log in bf16 would be too coarse for an outer step."""
    return torch.full(shape, value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
