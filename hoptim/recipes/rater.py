"""Rater: a learned network that rates examples by their features, weights them in training, and filters others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hoptim.checks import describe_type, is_finite
from hoptim.problem.functional import restore_attributes
from hoptim.problem.loss_checks import annotate_errors
from hoptim.recipes.arguments import cast

Batch = TypeVar("Batch")
Ratings = Tensor | Iterable[Tensor]  # all of them, or piece by piece


class Rater(nn.Module):
    """A learned network r(features) that rates examples, and the mean (1/B) Σ_i 2σ(r_i) ℓ_i of a batch's losses.

    :class:`ExampleWeights` has a weight for each example by its number, so that it knows those alone that it was trained on.
    A rater has what their features say, so that it rates any others too, and filters the next set: :meth:`rate` and
    :meth:`keep` for a set, :meth:`threshold` and :meth:`filter` for a stream.

    A rating is a logit: an example counts from 0 to 2 times, once at r = 0. The last layer of ``net``, which is the last one
    in ``net.modules()`` with weights, is set to 0. So all ratings are 0 at the start, if nothing but that layer makes them,
    and the mean is the plain one. Weights of one example do not depend on the others in its batch, as they would with
    DataRater's softmax over a batch: micro-batches and processes have the mean of the whole batch, and a high outer rate did
    less harm (scripts/studies/raters).

    Features are whatever ``net`` takes: a tensor, or a tuple or dict of tensors with an axis of examples in front. Give it
    what you would filter by otherwise, beside the inputs: from pixels and labels alone it hardly finds wrong labels, with
    the loss under a model of clean examples it does. The loss so far may be a feature too. Features get no gradient, so that
    a model cannot lower its loss by a higher one that lowers its weight.

    Args:
        net: the network, which returns one number for each example, of shape (B,) or (B, 1), with no sigmoid at its end. In
            a training loss it is in training mode, with its dropout or BatchNorm, and in :meth:`rate` in evaluation mode.

    Raises:
        TypeError: ``net`` is no module, or returns no floating-point tensor.
        ValueError: ``net`` has no parameter that can be learned, or returns another shape.

    Source: Calian et al. 2025, DataRater (arXiv 2505.17895).

    >>> import hoptim
    >>> _ = torch.manual_seed(0)
    >>> x, label = torch.randn(600, 3), torch.arange(600) % 2
    >>> x[:, 0] += 4 * label
    >>> broken = x[:, 2] > 0.5                                            # such examples have any label
    >>> label[:300][broken[:300]] = torch.randint(2, (int(broken[:300].sum()),))
    >>> def loss(model, hparams, batch):
    ...     return hparams.mean(nn.functional.cross_entropy(model(x[batch, :2]), label[batch], reduction="none"), x[batch])
    >>> model, rater = nn.Linear(2, 2), Rater(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)))
    >>> problem = hoptim.Problem(model, rater, loss)
    >>> inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> optimizer = hoptim.BilevelOptimizer(
    ...     inner, rater.optimizer(0.03), problem, val_batches=[torch.arange(300, 400)], every=5, warmup=100)
    >>> for _ in range(400):
    ...     optimizer.zero_grad()
    ...     optimizer.loss(torch.arange(300)).backward()
    ...     optimizer.step()
    >>> kept = rater.keep(rater.rate(x[400:].split(50)), share=0.5)      # of 200 examples that nobody trained on
    >>> int(kept.sum()), bool(broken[400:][kept].float().mean() < 0.5 * broken[400:].float().mean())
    (100, True)
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net is {describe_type(net)}: give an nn.Module that rates examples")
        layers = [[p for p in m.parameters(recurse=False) if p.requires_grad] for m in net.modules()]
        if not any(layers):
            raise ValueError("net has no parameter that requires a gradient: give a network with something to learn")
        self.net = net
        for parameter in next(filter(None, reversed(layers))):
            nn.init.zeros_(parameter)

    def forward(self, features: Any) -> Tensor:
        """The rating of each example, shape (B,)."""
        try:
            ratings = self.net(features)
        except Exception:
            with annotate_errors(f"the rater's net was given features of shape {_shapes(features)}"):
                raise
        if not isinstance(ratings, Tensor) or not ratings.is_floating_point():
            found = f"a tensor of {ratings.dtype}" if isinstance(ratings, Tensor) else describe_type(ratings)
            raise TypeError(f"the rater's net returned {found}: return a floating-point tensor, one number for each example")
        if ratings.ndim != 1 and (ratings.ndim != 2 or ratings.shape[1] != 1):
            raise ValueError(
                f"the rater's net returned shape {tuple(ratings.shape)} for features of shape {_shapes(features)}: "
                "return one number for each example, of shape (B,) or (B, 1)"
            )
        return ratings.reshape(-1)

    def mean(self, losses: Tensor, features: Any) -> Tensor:
        """(1/B) Σ_i 2σ(r_i) ℓ_i, for the training loss; in evaluation mode the plain mean.

        Args:
            losses: the loss ℓ_i of each of the B examples, shape (B,), as ``reduction="none"`` gives them.
            features: the features of these examples.

        Raises:
            ValueError: there are not as many ratings as losses.
        """
        if not self.training:
            return losses.mean()
        ratings = self(pytree.tree_map_only(Tensor, Tensor.detach, features))
        if losses.shape != ratings.shape:
            raise ValueError(
                f"losses have shape {tuple(losses.shape)} and ratings {tuple(ratings.shape)}: give one loss for each "
                'example of the batch, of shape (B,), from a criterion with reduction="none", and their features'
            )
        return (cast(2 * ratings.sigmoid(), losses) * losses).mean()

    def rate(self, batches: Iterable[Any]) -> Iterator[Tensor]:
        """Yield the ratings of each batch of features in order, in evaluation mode and without gradients; nothing is kept.

        Args:
            batches: features, batch by batch: a list, a ``DataLoader`` or any other stream.

        Raises:
            TypeError: ``batches`` is a single tensor, dict or string.
            ValueError: there is no batch, or a rating is NaN.
        """
        return (ratings for _, ratings in self._rated(batches, lambda batch: batch))

    def filter(
        self, batches: Iterable[Batch], threshold: float, features: Callable[[Batch], Any] = lambda batch: batch
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch of a stream with a mask, shape (B,), of its examples whose rating is ``threshold`` or above.

        Args:
            batches: the batches of any stream.
            threshold: the lowest rating to keep, as :meth:`threshold` finds it on a sample.
            features: ``features(batch)`` has those of the batch's examples; default: the batch itself.

        Raises:
            ValueError: ``threshold`` is NaN; and as for :meth:`rate`.
        """
        if math.isnan(threshold):
            raise ValueError(f"threshold is {threshold!r}: give a number, such as rater.threshold(ratings, share)")
        return ((batch, ratings >= threshold) for batch, ratings in self._rated(batches, features))

    def _rated(self, batches: Iterable[Batch], features: Callable[[Batch], Any]) -> Iterator[tuple[Batch, Tensor]]:
        if isinstance(batches, (Tensor, dict, str)):
            raise TypeError(f"batches is {describe_type(batches)}: give several, such as a list [batch] or a DataLoader")

        def rated() -> Iterator[tuple[Batch, Tensor]]:
            number, count = -1, 0
            for number, batch in enumerate(batches):
                with restore_attributes(list(self.modules())), torch.no_grad():  # never while the caller has the ratings
                    ratings = self.eval()(features(batch))
                _check_numbers(ratings, count, f", in batch {number},")
                count += len(ratings)
                yield batch, ratings
            if number < 0:
                raise ValueError("batches is empty: it gave no batch to rate, as a stream that was read before would")

        return rated()

    @staticmethod
    def keep(ratings: Ratings, share: float) -> Tensor:
        """A mask, shape (n,), of the share of all examples with the highest ratings; of equal ones the first are kept.

        An example counts 2 times at most, so that the order of the highest ratings says little, and a share much smaller
        than that of the ratings above 0 lacks variety. Choose it by the validation loss of a few trainings.

        Args:
            ratings: those of n examples, in a tensor or in pieces, as :meth:`rate` gives them.
            share: how many to keep, above 0 and at most 1: n·share, rounded, but at least one.

        Raises:
            ValueError: ``share`` is out of range, there is no rating, or one is NaN.
        """
        found, count = _checked(ratings, share)
        mask = torch.zeros(len(found), dtype=torch.bool, device=found.device)
        mask[found.argsort(descending=True, stable=True)[:count]] = True
        return mask

    @staticmethod
    def threshold(ratings: Ratings, share: float) -> float:
        """The rating at or above which a share of these examples is: of a sample, to :meth:`filter` a stream like it.

        A stream keeps the share up to the chance of the sample, some √(share·(1 − share)/n), and more where many ratings are
        equal. A share of 1 keeps all, by −∞. The arguments are those of :meth:`keep`.
        """
        found, count = _checked(ratings, share)
        return -torch.inf if share == 1 else found.topk(count).values[-1].item()

    def optimizer(self, lr: float = 0.003) -> torch.optim.Adam:
        """The outer optimizer for it: Adam on its weights."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=lr)

    @property
    def degrees_of_freedom(self) -> int:
        """How many weights are learned."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _shapes(features: Any) -> Any:
    """The shape of each tensor in features, and the types of other parts, for an error message."""
    return pytree.tree_map(lambda one: tuple(one.shape) if isinstance(one, Tensor) else describe_type(one), features)


def _check_numbers(ratings: Tensor, first: int, where: str = "") -> None:
    """Raise ValueError if a rating is NaN; ``first`` is the number of the first example."""
    if (bad := ratings.isnan()).any():
        number = first + int(bad.nonzero()[0])
        raise ValueError(
            f"the rating of example {number}{where} is NaN: look for NaN in its features and the rater's weights"
        )


def _pieces(ratings: Ratings) -> Iterator[Tensor]:
    """The ratings piece by piece, each of them checked."""
    count = 0
    for piece in [ratings] if isinstance(ratings, Tensor) else ratings:
        if not isinstance(piece, Tensor) or piece.ndim != 1:
            found = f"of shape {tuple(piece.shape)}" if isinstance(piece, Tensor) else describe_type(piece)
            raise TypeError(
                f"ratings has a piece that is {found}: give a tensor of shape (n,), or several such as rate() gives"
            )
        _check_numbers(piece, count)
        count += len(piece)
        yield piece


def _checked(ratings: Ratings, share: float) -> tuple[Tensor, int]:
    """All ratings, and how many of them are to be kept."""
    if not (is_finite(share) and 0 < share <= 1):
        raise ValueError(f"share is {share!r}: give the share of examples to keep, above 0 and at most 1")
    pieces = list(_pieces(ratings))
    if not sum(map(len, pieces)):
        raise ValueError("ratings is empty: there is no example to choose from")
    found = torch.cat(pieces)
    return found, max(1, round(share * len(found)))
