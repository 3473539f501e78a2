"""Weights that have gone to zero while hyperparameters were learned, as too large a decay takes them there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hoptim.problem.problem import Problem

GONE = 0.01  # of the norm at the start; in scripts/arrive.py models that learned kept 5 %, those that died less than 1 %


def norms(problem: Problem) -> dict[str, float]:
    """The norms of the weights of two axes or more; others, such as biases, may begin and stay near zero."""
    weights = {name: weight.detach() for name, weight in problem.weights().items() if weight.ndim > 1}
    found = torch._foreach_norm(list(weights.values())) if weights else []
    return {name: float(norm) for name, norm in zip(weights, found, strict=True)}


def collapsed(problem: Problem, begun: Mapping[str, float]) -> dict[str, str]:
    """A doubt if a weight has all but gone from the norm that it had when training began; none if no weight has."""
    shares = {name: now / begun[name] for name, now in norms(problem).items() if begun.get(name)}
    name = min(shares, key=lambda name: shares[name], default=None)
    if name is None or not shares[name] < GONE:
        return {}
    return {
        "collapsed": f"weight {name!r} is at {shares[name]:.2g} of the norm that it had when training began: if nothing "
        "else takes it to zero, a decay is too large, the model hardly depends on its input, and hypergradients say little. "
        "Start again with a smaller decay"
    }
