"""PriorScale: the scales of Gaussian priors on the weights, which are weight decays in other units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hoptim.recipes.start import check_between, check_count
from hoptim.recipes.weight_decay import Per, WeightDecay


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
