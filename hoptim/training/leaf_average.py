"""The mean of the learned leaves over the later hypersteps."""

from __future__ import annotations

from typing import Any

import torch

from hoptim.linalg.vectors import Tree
from hoptim.problem.problem import Problem
from hoptim.training.outer_step import project_


class LeafAverage:
    """The mean of a problem's leaves over the hypersteps after the first ``skip``.

    >>> from torch import nn
    >>> hparams = nn.ParameterDict({"decay": torch.tensor(1.0)})
    >>> average = LeafAverage(Problem(nn.Linear(1, 1), hparams, lambda m, h, b: 0, lambda m, h, b: 0), skip=1)
    >>> for value in (8.0, 2.0, 3.0):
    ...     _ = hparams["decay"].data.fill_(value)
    ...     average.add()
    >>> average.put()
    >>> hparams["decay"].item()
    2.5
    """

    def __init__(self, problem: Problem, skip: int) -> None:
        self._problem, self._skip, self._seen = problem, skip, 0
        self._mean: Tree = {}

    def add(self) -> None:
        """Add the leaves after another hyperstep."""
        self._seen += 1
        count = self._seen - self._skip
        if count < 1:
            return
        for name, leaf in self._problem.leaves().items():
            value = leaf.detach().clone()
            self._mean[name] = value if count == 1 else self._mean[name].lerp(value, 1 / count)

    @torch.no_grad()
    def put(self) -> None:
        """Set the leaves to their mean, if there were any hypersteps after the first ``skip``."""
        for name, value in self._mean.items():
            self._problem.leaves()[name].copy_(value)
        project_(self._problem)

    def state_dict(self) -> dict[str, Any]:
        """The mean, and the number of hypersteps."""
        return {"seen": self._seen, "mean": dict(self._mean)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore it, on the devices of the leaves."""
        leaves, self._seen = self._problem.leaves(), saved["seen"]
        self._mean = {name: value.to(leaves[name].device) for name, value in saved["mean"].items()}
