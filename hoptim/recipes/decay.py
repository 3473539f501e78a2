"""Learned weight decays, and the scales of Gaussian priors that they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.methods.learned_options import Pull
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.loss_checks import check_real
from hoptim.recipes.arguments import cast, check_between, check_count
from hoptim.recipes.model_parts import beside, full, levels_of, part_of, total, unwrapped

Per = Literal["global", "tensor", "channel", "weight"]


class WeightDecay(HyperParameters):
    """Learned weight decays, and their penalty ½ Σ_k λ_k ‖w_k‖², whose gradient is λ_k w_k.

    Each λ_k is positive and its leaf is log λ_k. All λ_k share a level, and those of a tensor another one, since what is
    wrong at first is their common size: a step of :meth:`optimizer` changes all of them by a factor of up to e^0.6, in later
    steps by less, and each beside the others by e^0.1.

    With ``BilevelOptimizer(..., options={"weight_decay": decays})`` they are the inner optimizer's own decays, decoupled in
    AdamW. Or add ``penalty(model)`` to the training loss, and set the optimizer's own ``weight_decay`` to 0.

    The decayed weights are those that require a gradient and have at least two axes. Biases and norms are left out, also a
    ``LayerNorm`` or ``RMSNorm`` over several axes; embeddings are decayed. A tied weight counts once. A weight that is
    unfrozen later has no decay; a warning says so once. Names are those of the model inside its wrappers: the decay of the
    weight ``"0.weight"`` is ``hparams["decay.0.weight"]``, a global decay is ``hparams["decay"]``. A decay is on the device
    of its weight, in float32 or more.

    Args:
        model: the model, before or after it is wrapped. Move it to its device first.
        per: what has its own λ: all weights together (``"global"``, shape ()), each tensor (shape ()), each output channel
            of a tensor, which is its first axis (shape (n,)), or each weight (the tensor's shape).
        start: λ at the start, positive; default: the optimizer's own ``weight_decay`` if these decays are its option, and
            it has one, else 1e-4. In the loss, Adam divides the penalty's gradient by its own size, so that even a small λ
            pulls weights in: in a short fine-tuning 1e-4 kept a model from fitting, and 1e-6 did not.
        norm: 2 for ½ Σ λ_k ‖w_k‖²; 1 for Σ λ_k |w_k|, the lasso, which has no curvature of its own. As an option of the
            optimizer it is a soft threshold after each step, and its weights become exactly zero; in the loss weights only
            come near zero, where its hypergradient is wrong.
        towards: what weights are pulled towards: ``"zero"``, or ``"start"``, the weights that the model has now, such as
            pretrained ones: then w_k − w_k⁰ stands in place of w_k. These are saved with the decays.
        decoupled: as an option of the optimizer, whether a decay acts on the weight beside the step, as in AdamW, or is
            added to its gradient; default: as the optimizer's own. Of norm 1 it always acts beside it.
        include: ``include(name, weight) -> bool`` says which of the weights that require a gradient are decayed, instead of
            the rule above.

    Raises:
        TypeError: ``model`` is no module, or a weight is complex.
        ValueError: ``per``, ``start``, ``norm``, ``towards`` or ``decoupled`` is none of these, there is no weight to decay,
            or one has no values yet.

    Sources: Krogh and Hertz 1991, A simple weight decay can improve generalization; Li, Grandvalet and Davoine 2018,
    Explicit inductive bias for transfer learning with convolutional networks (``towards="start"``).

    >>> from hoptim import BilevelOptimizer, Problem
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(40, 4), torch.arange(40) % 3
    >>> def loss(model, hparams, batch):
    ...     return nn.functional.cross_entropy(model(x[batch]), y[batch]) + hparams.penalty(model)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    >>> decay = WeightDecay(model, per="tensor", start=1e-2)
    >>> decay
    WeightDecay(per='tensor', norm=2): 2 decays of 56 weights in 2 tensors, from 0.01 to 0.01
    >>> inner, problem = torch.optim.SGD(model.parameters(), lr=0.1), Problem(model, decay, loss)
    >>> val = [torch.arange(20, 40)]
    >>> optimizer = BilevelOptimizer(inner, decay.optimizer(), problem, val_batches=val, every=10, warmup=100)
    >>> for _ in range(300):
    ...     optimizer.zero_grad()
    ...     optimizer.loss(torch.arange(20)).backward()
    ...     optimizer.step()
    >>> decay                                                           # the labels are noise, so decays grow
    WeightDecay(per='tensor', norm=2): 2 decays of 56 weights in 2 tensors, from 0.564 to 1.03

    The same decay in the optimizer's step, from its own number on:

    >>> def plain(model, hparams, batch):
    ...     return nn.functional.cross_entropy(model(x[batch]), y[batch])
    >>> decay, inner = WeightDecay(model), torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    >>> problem, options = Problem(model, decay, plain), {"weight_decay": decay}
    >>> optimizer = BilevelOptimizer(inner, decay.optimizer(), problem, val_batches=val, options=options)
    >>> decay
    WeightDecay(per='tensor', norm=2): 2 decays of 56 weights in 2 tensors, from 0.1 to 0.1
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        per: Per = "tensor",
        start: float | None = None,
        norm: Literal[1, 2] = 2,
        towards: Literal["zero", "start"] = "zero",
        decoupled: bool | None = None,
        include: Callable[[str, nn.Parameter], bool] | None = None,
    ) -> None:
        module = unwrapped(model)
        if per not in get_args(Per):
            raise ValueError(f"per is {per!r}: give one of {', '.join(map(repr, get_args(Per)))}")
        if norm not in (1, 2):
            raise ValueError(f"norm is {norm!r}: give 2 for ½ Σ λ‖w‖², or 1 for Σ λ|w|")
        if towards not in ("zero", "start"):
            raise ValueError(f'towards is {towards!r}: give "zero", or "start" for the weights that the model has now')
        if decoupled not in (None, True, False) or (norm == 1 and decoupled is False):
            raise ValueError(f"decoupled is {decoupled!r}: give True, False or None, and not False with norm=1")
        if start is not None:
            check_between("start", start, 0)
        check_real("weight", module.named_parameters())
        is_decayed = include or _is_matrix_of(module)
        usable = {name: p for name, p in module.named_parameters() if is_decayed(name, p)}
        weights = {name: p for name, p in usable.items() if p.requires_grad}
        if not weights:
            raise ValueError(
                "the model has no weight to decay: none requires a gradient and has at least two axes; see include"
            )
        first = 1e-4 if start is None else start
        values = {"decay": full((), first, next(iter(weights.values())))}
        if per != "global":
            axes = {"tensor": 0, "channel": 1, "weight": None}[per]
            values = {f"decay.{name}": full(p.shape[:axes], first, p) for name, p in weights.items()}
        super().__init__(values, dict.fromkeys(values, constraints.positive), levels_of(values))
        self.per, self.norm, self.towards, self.decoupled = per, norm, towards, decoupled
        self._first = first if start is None else None
        self._shapes = {name: p.shape for name, p in weights.items()}
        self._frozen = [name for name in usable if name not in weights]  # emptied after the warning
        for name, p in weights.items() if towards == "start" else ():
            self.register_buffer(_buffer(name), p.detach().clone())

    def names_by_weight(self) -> dict[str, str]:
        """The name of its decay for each decayed weight, for ``options={"weight_decay": decays}``."""
        return {name: "decay" if self.per == "global" else f"decay.{name}" for name in self._shapes}

    def pull_of(self, weight: str) -> Pull:
        """How the decay of this weight pulls it, for ``options={"weight_decay": decays}``."""
        return Pull(self.norm, self.decoupled, self._centre(weight))

    def _centre(self, weight: str) -> Tensor | None:
        return None if self.towards == "zero" else self.get_buffer(_buffer(weight))

    def start_from(self, numbers: Mapping[str, float]) -> None:
        """Start with these numbers by weight, where they are positive, if no start was given and no decay has moved.

        Raises:
            ValueError: there is one decay for all, and the numbers differ.
        """
        first, self._first = self._first, None
        if first is None or any(((self[name] / first - 1).abs() > 1e-5).any() for name in self):
            return
        for weight, name in self.names_by_weight().items():
            if (number := numbers.get(weight, 0.0)) <= 0:
                continue
            if self.per == "global" and len({numbers.get(one) for one in self._shapes}) > 1:
                raise ValueError(
                    'per is "global", and the optimizer\'s parameter groups have different numbers for weight_decay: give '
                    'start, or per="tensor"'
                )
            self[name] = torch.full_like(self[name], number)

    def penalty(self, model: Any) -> Tensor:
        """½ Σ_k λ_k ‖w_k‖², or Σ_k λ_k |w_k|, of the model's weights as they are now: a scalar; 0 in evaluation mode.

        Args:
            model: the model that the training loss gets.

        Raises:
            ValueError: a decayed weight is missing in ``model``, has another shape, or is now tied to another one.
        """
        if not self.training:
            return next(self.parameters()).new_zeros(())
        module = unwrapped(model)
        self._warn_of_unfrozen(module)
        together = self["decay"] if self.per == "global" else None
        terms, seen = list[Tensor](), set[int]()
        for name, shape in self._shapes.items():
            found = part_of(module, name)
            if found is None or found.shape != shape or id(found) in seen:
                now = "missing" if found is None else f"of shape {tuple(found.shape)}"
                now = "tied to another" if id(found) in seen else now
                raise ValueError(
                    f"weight {name!r} had shape {tuple(shape)} when WeightDecay was made, and is {now} in this model: "
                    "give penalty the same model, and make WeightDecay after the model has its final layers"
                )
            seen.add(id(found))
            decay = self[f"decay.{name}"] if together is None else together
            w = cast(found if (centre := self._centre(name)) is None else found - beside(centre, found), decay)
            size = w * w if self.norm == 2 else w.abs()
            if decay.ndim < w.ndim:  # a norm is no faster, and has no second derivative at zero weights
                size = size.sum(dim=tuple(range(decay.ndim, w.ndim)))
            decay = beside(decay, size)
            terms.append((decay * size).sum() if decay.ndim else decay * size)
        return total(terms) / 2 if self.norm == 2 else total(terms)

    def _warn_of_unfrozen(self, module: nn.Module) -> None:
        unfrozen = [name for name in self._frozen if (w := part_of(module, name)) is not None and w.requires_grad]
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
            f"{type(self).__name__}(per={self.per!r}, norm={self.norm}): {self.degrees_of_freedom} decays of "
            f"{count} weights in {len(self._shapes)} tensors, from {values.min():.3g} to {values.max():.3g}"
        )


def _buffer(weight: str) -> str:
    """The name of the buffer with a weight's centre; names of buffers have no dots."""
    return "start:" + weight.replace(".", "/")


def _is_matrix_of(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """The rule that leaves out biases and norms. Weights of other norms than these two have one axis."""
    norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))]
    scales = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    return lambda _, p: p.ndim >= 2 and id(p) not in scales


class PriorScale(WeightDecay):
    """Learned scales σ_k of priors w_k ~ N(0, σ_k²), and their negative log density for each example, Σ_k ‖w_k‖²/(2σ_k²·n).

    Added to the mean of −log p(y|x, w) over the n training examples, it gives the negative log posterior divided by n. It is
    a :class:`WeightDecay` with λ_k = 1/(n·σ_k²), the leaves log λ_k, and its levels. The decay scales with the size of the
    data, so the same σ_k suits a data set of another size.

    Args:
        model: as in :class:`WeightDecay`, like ``per`` and ``include``.
        examples: n, how many training examples there are.
        per: what has its own σ.
        start: σ at the start, default 1.
        include: which weights have a prior.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``examples`` is no positive whole number, ``start`` is not positive; or as in :class:`WeightDecay`.

    Source: MacKay 1992, A practical Bayesian framework for backpropagation networks, section 3.

    >>> model = nn.Linear(2, 3)
    >>> _ = nn.init.ones_(model.weight)
    >>> hparams = PriorScale(model, examples=100, start=0.5)
    >>> round(hparams.penalty(model).item(), 4), round(hparams.scale("weight").item(), 4)                # 6/(2·0.25·100)
    (0.12, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        examples: int,
        *,
        per: Per = "tensor",
        start: float = 1.0,
        include: Callable[[str, nn.Parameter], bool] | None = None,
    ) -> None:
        check_count("examples", examples, "how many training examples there are")
        check_between("start", start, 0)
        super().__init__(model, per=per, start=1 / (examples * start**2), include=include)
        self.examples = examples

    def scale(self, weight: str = "") -> Tensor:
        """σ of the weight of this name; that of all weights if ``per`` is ``"global"``."""
        name: Any = "decay" if self.per == "global" else f"decay.{weight}"
        return (self.examples * self[name]).rsqrt()
