"""Learned weights of examples, of the sources that they come from, and of several losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from hoptim.problem.constraint import Shares
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.arguments import (
    cast,
    check_between,
    check_count,
    checked_index,
    checked_names,
    weighted_mean,
    weighted_sum,
)

NAME = "example_weight"
Trusted = Tensor | Sequence[int] | Sequence[bool] | Set[int]


class ExampleWeights(HyperParameters):
    """Learned weights w_i in (0, 1) of n training examples, and the mean (1/B) Σ_i (w_i/w⁰) ℓ_i of a batch's losses.

    The leaf of a weight is its logit, and w⁰ is the weight that all of them start with. So the mean is the plain one at the
    start, to the bit, and a training before the first hyperstep is the one without weights. Later an example counts from 0
    to 1/w⁰ times, 2 times by default, so that a step is up to 1/w⁰ times as long: where that is too long, take a smaller
    inner rate. SGD at half the rate, with twice its weight decay, takes the steps that the mean of w_i ℓ_i gives.

    An example that is known to be right has the fixed weight 1, so that it counts 1/w⁰ times, as the best of the others come
    to: in a training on both, a label that was learned to be right and one that is known to be right are worth the same. So
    one data set can have both examples with doubtful labels, whose weights are learned, and examples with right ones, which
    are the validation data meanwhile; ``hoptim.retrain`` then trains on all of them, with the same loss.

    ``hparams["example_weight"]``, of shape (n,), has the weight w_i of every example, 1 where it is fixed. The mean divides
    by the number B of examples in the batch, not by the sum of their weights: low weights make small steps. A hyperstep
    moves only the weights of examples in its training batch, so give ``BilevelOptimizer`` large ``train_batches`` if n is
    large.

    Args:
        n: how many examples there are.
        start: w⁰, the weight of each at the start, default 0.5.
        trusted: the examples of fixed weight 1, as a list, a set or a tensor of indices, of any whole type, or as a mask of
            n ``bool``; default, or if it is empty: none.
        groups: the class or the source of each example, whole numbers from 0 of shape (n,), if weights of one group are to
            move together as well as each by itself; default: each by itself.

    Raises:
        TypeError: ``trusted`` is neither, or ``groups`` is no tensor of whole numbers.
        IndexError: ``trusted`` has an index that is out of range.
        ValueError: ``n`` is no positive whole number, ``start`` is not between 0 and 1, or ``trusted`` has all examples, or
            n numbers that are all 0 or 1, as a mask that is not ``bool``.

    Source: Ren et al. 2018, Learning to reweight examples for robust deep learning (arXiv 1803.09050).

    >>> import hoptim
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> x, label = torch.randn(300, 2), torch.arange(300) % 2
    >>> x[:, 0] += 4 * label
    >>> label[:60] = 1 - label[:60]                                       # the first 60 labels are wrong
    >>> def loss(model, hparams, batch):
    ...     return hparams.mean(nn.functional.cross_entropy(model(x[batch]), label[batch], reduction="none"), batch)
    >>> noisy, clean = torch.arange(200), torch.arange(200, 300)
    >>> model, hparams = nn.Linear(2, 2), ExampleWeights(300, trusted=clean)
    >>> problem = hoptim.Problem(model, hparams, loss)
    >>> inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> optimizer = hoptim.BilevelOptimizer(
    ...     inner, hparams.optimizer(), problem, val_batches=[clean], every=5, warmup=100)
    >>> for _ in range(400):
    ...     optimizer.zero_grad()
    ...     optimizer.loss(noisy).backward()
    ...     optimizer.step()
    >>> weight = hparams["example_weight"].detach()
    >>> bool(weight[:60].mean() < 0.2), bool(weight[60:200].mean() > 0.8), weight[200:].unique().item()
    (True, True, 1.0)
    """

    trusted: Tensor
    start: Tensor  # the leaves at the start

    def __init__(self, n: int, *, start: float = 0.5, trusted: Trusted | None = None, groups: Tensor | None = None) -> None:
        check_count("n", n, "the number of examples")
        check_between("start", start, 0, 1)
        mask, levels = _mask(n, trusted), [] if groups is None else [{NAME: groups}]
        super().__init__({NAME: torch.full((n,), float(start))}, {NAME: constraints.unit_interval}, levels)
        if groups is not None:  # those of fixed weight are in a group of their own
            self._levels = [{NAME: groups.long().cpu().masked_fill(mask, int(groups.max()) + 1)}]
        self.register_buffer("trusted", mask)
        self.register_buffer("start", self._leaf(NAME).detach().clone())

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        return value.masked_fill(self.trusted, 1.0) if name == NAME else value

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Set the weights; fixed ones stay 1."""
        own = isinstance(value, Tensor) and name == NAME and value.shape == self.trusted.shape
        super().__setitem__(name, value.masked_fill(self.trusted.to(value.device), 0.5) if own else value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if (leaf := state_dict.get(prefix + NAME)) is not None:  # an earlier version had w⁰ = 1, whose logit is infinite
            state_dict.setdefault(prefix + "start", torch.full_like(leaf, torch.inf))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def mean(self, losses: Tensor, index: Tensor) -> Tensor:
        """(1/B) Σ_i (w_i/w⁰) ℓ_i, for the training loss; in evaluation mode the plain mean, whatever the index.

        Args:
            losses: the loss ℓ_i of each of the B examples, shape (B,), as ``reduction="none"`` gives them.
            index: the indices of these examples, shape (B,), whole numbers below n.

        Raises:
            TypeError: ``index`` is no tensor of whole numbers.
            ValueError: the shapes are not the same (B,).
        """
        if not self.training:
            return losses.mean()
        return weighted_mean(losses, self[NAME] / self._transforms[NAME](self.start), "index", index)

    @property
    def degrees_of_freedom(self) -> int:
        """How many weights are learned, without the fixed ones."""
        return int((~self.trusted).sum())

    def __repr__(self) -> str:
        learned = self[NAME].detach()[~self.trusted]
        n, fixed = len(self.trusted), int(self.trusted.sum())
        return (
            f"ExampleWeights(n={n}): {len(learned)} learned weights from {learned.min():.3g} to {learned.max():.3g}, "
            f"{fixed} fixed at 1"
        )


def _mask(n: int, trusted: Trusted | None) -> Tensor:
    """Which of n examples have a fixed weight, as n ``bool``."""
    mask = torch.zeros(n, dtype=torch.bool)
    if trusted is None or not len(trusted):
        return mask
    found = torch.as_tensor(sorted(trusted) if isinstance(trusted, Set) else trusted, device="cpu")
    if found.dtype is torch.bool and found.shape == mask.shape:
        mask = found.clone()
    else:
        mask[checked_index("trusted", found, n)] = True
        if len(found) == n > 2 and int(found.max()) <= 1:
            raise ValueError(f"trusted has {n} numbers that are 0 or 1, as a mask: give it as bool, or each index once")
    if bool(mask.all()):
        raise ValueError(f"all {n} examples are trusted, so that no weight is left to learn: leave some out of trusted")
    return mask


class DomainWeights(HyperParameters):
    """A learned mixture p of K data sources, p_d > 0 and Σ_d p_d = 1, and its loss Σ_d p_d·(mean loss on source d).

    A batch of B examples, of which example i is of source d_i and was drawn with the share q_i of that source, estimates
    this loss and its derivative in p by

        (1/B) Σ_i p_{d_i}/q_i · ℓ_i.

    There are two ways to train by it. *Weighted in the loss*: batches come from the data as they are, q is the share of a
    source in the data, and a batch tells as little as one of 1/Σ_d p_d²/q_d times its size (Kish's effective sample size, if
    the gradients of all sources are alike): what has a small weight is computed in vain. *Sampled*: :class:`hoptim.Mixture`
    draws by p itself and gives q with each example, so that the loss is the plain mean and each example counts in full.
    Hypersteps are better off with batches that have as much of each source, ``train_batches`` of ``BilevelOptimizer``, for
    of a source that is hardly drawn nothing is learned.

    ``hparams["mixture"]`` is p, of shape (K,), in the order of the names; ``hparams.probabilities`` has it by name, for
    ``Mixture`` or for ``datasets.interleave_datasets(..., probabilities=list(hparams.probabilities.values()))``.

    Args:
        sizes: how many examples each source has, or its share or probability, by name; two sources or more, K − 1 degrees of
            freedom. p starts there: give all sources 1 to begin with all alike.

    Raises:
        TypeError: when called, ``source`` is no tensor of whole numbers.
        ValueError: there are fewer than two sources, a size is not positive, or one is lost beside the others; when called,
            shapes differ.

    Source: Xie et al. 2023, DoReMi (arXiv 2305.10429), who move p by another rule; Pan et al. 2024, ScaleBiO (arXiv
    2406.19976), by a hypergradient.

    >>> hparams = DomainWeights({"web": 900, "books": 100})
    >>> hparams["mixture"].detach()
    tensor([0.9000, 0.1000])
    >>> losses, source = torch.tensor([1.0, 3.0]), torch.tensor([0, 1])
    >>> round(hparams.mean(losses, source).item(), 4)
    2.0
    >>> hparams["mixture"] = torch.tensor([0.8, 0.2])
    >>> round(hparams.mean(losses, source).item(), 4)                                # (0.8/0.9·1 + 0.2/0.1·3)/2
    3.4444
    >>> round(hparams.mean(losses, source, torch.tensor([0.8, 0.2])).item(), 4)      # drawn by p
    2.0
    """

    shares: Tensor
    outer_rate = 0.3  # chosen in scripts/studies/mixtures

    def __init__(self, sizes: Mapping[str, float]) -> None:
        self.names = checked_names("sizes", list(sizes))
        counts = torch.tensor([float(size) for size in sizes.values()])
        super().__init__({"mixture": counts / counts.sum()}, {"mixture": Shares()})
        self.register_buffer("shares", self["mixture"].detach())

    def mean(self, losses: Tensor, source: Tensor, share: Tensor | None = None) -> Tensor:
        """(1/B) Σ_i p_{d_i}/q_i · ℓ_i, for the training loss; in evaluation mode the plain mean, whatever the sources.

        Args:
            losses: the loss of each of the B examples, shape (B,), as ``reduction="none"`` gives them.
            source: the source of each example, shape (B,), as its number in the order of the names.
            share: q_i, with which share of all examples that source was drawn then, shape (B,), as ``Mixture`` gives it;
                default: its share in ``sizes``.
        """
        if not self.training:
            return losses.mean()
        if share is None:
            return weighted_mean(losses, self["mixture"] / self.shares, "source", source)
        if share.shape != losses.shape:
            raise ValueError(f"losses have shape {tuple(losses.shape)} and share {tuple(share.shape)}: give one share each")
        return weighted_mean(losses / cast(share, losses), self["mixture"], "source", source)

    @property
    def probabilities(self) -> dict[str, float]:
        """p by name, which adds up to 1 in float64."""
        p = self["mixture"].detach().double()
        return dict(zip(self.names, (p / p.sum()).tolist(), strict=True))

    @property
    def degrees_of_freedom(self) -> int:
        """K − 1, since the sum is fixed."""
        return len(self.names) - 1


class LossWeights(HyperParameters):
    """Learned weights w_k of the losses of K tasks, and the weighted sum Σ_k w_k L_k, where w_k > 0 and Σ_k w_k = K.

    All weights are 1 at the start. Their sum is fixed, since the size of the whole loss is a matter of the learning rate.
    Their natural value is ``hparams["share"]`` = w/K, of shape (K,), in the order of the names. The validation loss should
    be what counts in the end: the loss of the one task that matters, by another function, or the plain sum, which
    :meth:`sum` gives in evaluation mode.

    Args:
        names: the names of the tasks, two or more; there are K − 1 degrees of freedom.

    Raises:
        ValueError: there are fewer than two names, or one is given twice; when called, a loss is missing, or there is one
            more.

    Source: Caruana 1997, Multitask learning; weights by implicit differentiation: Navon et al. 2021 (arXiv 2007.02693).

    >>> hparams = LossWeights(["depth", "normals"])
    >>> hparams["share"] = torch.tensor([0.75, 0.25])
    >>> hparams.sum({"depth": torch.tensor(1.0), "normals": torch.tensor(2.0)}).item()           # 1.5·1 + 0.5·2
    2.5
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = checked_names("names", names)
        even = torch.full((len(self.names),), 1 / len(self.names))
        super().__init__({"share": even}, {"share": constraints.simplex})

    def sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Σ_k w_k L_k of the losses by name, which all have the same shape; in evaluation mode all w_k are 1."""
        weights = len(self.names) * self["share"] if self.training else torch.ones(len(self.names))
        return weighted_sum("losses", losses, self.names, weights)
