"""Mixture: a stream of examples from several sources, each drawn with a probability that may change while it runs."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from hoptim.checks import describe_type

GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, less whole numbers, fill (0, 1) more evenly than those of any other number


class Mixture(IterableDataset[tuple[Any, int, float]]):
    """Examples of several sources without an end, each with the number d of its source and the probability q_d then.

    The t-th source is the one in whose part of (0, 1), of length q_d, the number u_t = u_0 + t·φ mod 1 lies, with φ = 0.618…
    So a source has its share in each batch of any size as nearly as whole examples allow, where independent draws would make
    it vary by √(B·q_d·(1 − q_d)); u_0 is random, so that no source is preferred.

    A source that can be indexed is gone through in a random order, each pass in another one, and shared among the workers of
    a ``DataLoader`` and the ranks of a training. Any other iterable is read as it is, and begun again at its end; it shares
    itself among workers, as every ``IterableDataset`` has to, and Hugging Face's do.

    ``update`` changes the probabilities also in workers that run already. They have some batches ready then, which still
    carry the q that they were drawn with. So learned weights follow a training by
    ``hooks=[lambda record: mixture.update(hparams["mixture"])]``.

    Args:
        sources: a ``Dataset``, a list, a Hugging Face dataset or another iterable of examples, by name.
        probabilities: a number for each source, by name, of which only ratios matter; default: all sources alike. One that
            is 0 is not drawn.
        seed: of orders and of u_0, default 0.

    Raises:
        TypeError: a source is no iterable.
        ValueError: a source has no examples, which for an iterable is found when it is drawn from, or one that can be
            iterated only once has ended; probabilities are not those of the sources, negative, not finite, or all 0.

    Source: the sequence u_t is Weyl's and Kronecker's; Niederreiter 1992, Random number generation and quasi-Monte Carlo
    methods, chapter 3.

    >>> mixture = Mixture({"web": ["w0", "w1", "w2", "w3"], "books": ["b0", "b1"]}, {"web": 3, "books": 1})
    >>> [source for _, (example, source, share) in zip(range(12), mixture)]
    [0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    >>> mixture.update({"web": 0, "books": 1})
    >>> sorted({example for _, (example, *_) in zip(range(8), mixture)})
    ['b0', 'b1']
    """

    probabilities: Tensor

    def __init__(
        self,
        sources: Mapping[str, Iterable[Any]],
        probabilities: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.sources, self.seed = dict(sources), seed
        self.names = tuple(sources)
        if not self.names:
            raise ValueError("sources is empty: give a dataset for each name")
        for name, source in self.sources.items():
            if isinstance(source, (str, bytes)) or not (_is_indexed(source) or hasattr(source, "__iter__")):
                raise TypeError(f"source {name!r} is {describe_type(source)}: give a dataset, a list or another iterable")
            if _is_indexed(source) and not len(source):  # type: ignore[arg-type]
                raise ValueError(f"source {name!r} has no examples: leave it out")
        self.probabilities = torch.ones(len(self.names), dtype=torch.float64).div_(len(self.names)).share_memory_()
        if probabilities is not None:
            self.update(probabilities)

    def update(self, probabilities: Mapping[str, float] | Tensor) -> None:
        """Draw by other probabilities from now on.

        Args:
            probabilities: by name, or as a tensor in the order of the names, such as ``hparams["mixture"]``.
        """
        if isinstance(probabilities, Mapping):
            if strangers := set(probabilities) ^ set(self.names):
                raise ValueError(
                    f"probabilities and sources differ in {sorted(strangers)}: the sources are {list(self.names)}"
                )
            probabilities = torch.tensor([float(probabilities[name]) for name in self.names], dtype=torch.float64)
        found = probabilities.detach().to("cpu", torch.float64)
        if found.shape != self.probabilities.shape:
            raise ValueError(f"probabilities have shape {tuple(found.shape)}: there are {len(self.names)} sources")
        if not (bool(found.isfinite().all()) and bool((found >= 0).all()) and bool(found.sum() > 0)):
            given = dict(zip(self.names, found.tolist(), strict=True))
            raise ValueError(f"probabilities are {given}: give finite numbers, none of them below 0, and not all 0")
        self.probabilities.copy_(found / found.sum())

    def __iter__(self) -> Iterator[tuple[Any, int, float]]:
        """The examples of this worker of this rank."""
        shard, shards = _shard()
        streams = [
            self._in_random_order(number, shard, shards) if _is_indexed(source) else _again_and_again(name, source)
            for number, (name, source) in enumerate(self.sources.items())
        ]
        place = float(torch.rand((), dtype=torch.float64, generator=self._generator(len(streams), shard)))
        while True:
            q = self.probabilities.tolist()  # another process may be changing them, so that they may not add up to 1
            ends = list(accumulate(q))
            source = bisect(ends, place * ends[-1], hi=len(ends) - 1)
            yield next(streams[source]), source, q[source] / ends[-1]
            place = (place + GOLDEN) % 1

    def _in_random_order(self, number: int, shard: int, shards: int) -> Iterator[Any]:
        """Every ``shards``-th example of a source from ``shard`` on, pass after pass, each pass in an order of its own."""
        source: Any = self.sources[self.names[number]]
        at, turn, order = shard, -1, torch.empty(0)
        while True:
            if at // len(source) > turn:
                turn = at // len(source)
                order = torch.randperm(len(source), generator=self._generator(number, turn))
            yield source[int(order[at % len(source)])]
            at += shards

    def _generator(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.seed, *numbers)) % 2**63)


def _is_indexed(source: Any) -> bool:
    return (
        hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, (Mapping, IterableDataset))
    )


def _again_and_again(name: str, source: Iterable[Any]) -> Iterator[Any]:
    """The examples of an iterable, pass after pass."""
    while True:
        count = 0
        for count, example in enumerate(source, 1):  # noqa: B007
            yield example
        if not count:
            raise ValueError(f"source {name!r} gave no examples: it is empty, or it ended and cannot be iterated again")


def _shard() -> tuple[int, int]:
    """The number of this worker among those of all ranks, and how many they are."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    return rank * workers + worker, ranks * workers
