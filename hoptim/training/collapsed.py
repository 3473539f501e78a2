"""Weights that have gone to zero while hyperparameters were learned, as too large a decay takes them there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hoptim.problem.problem import Problem

GONE = 0.01  # of the norm at the start; in scripts/arrive.py models that learned kept 5 %, those that died less than 1 %


def norms(problem: Problem) -> dict[str, float]:
    """The norms of the matrices among the weights; others, such as biases and scales, may begin and stay near zero."""
    live = problem.weights().items()
    weights = {name: weight.detach() for name, weight in live if weight.ndim > 1 and min(weight.shape[:2]) > 1}
    wide = {name: torch.promote_types(weight.dtype, torch.float32) for name, weight in weights.items()}
    found = [torch.linalg.vector_norm(weight, dtype=wide[name]).float() for name, weight in weights.items()]
    return dict(zip(weights, torch.stack([one.to(found[0].device) for one in found]).tolist() if found else [], strict=True))


def collapsed(problem: Problem, begun: Mapping[str, float]) -> dict[str, str]:
    """A doubt if a weight has all but gone from the norm that it had when training began; none if no weight has."""
    shares = {name: now / begun[name] for name, now in norms(problem).items() if begun.get(name)}
    name = min(shares, key=lambda name: shares[name], default=None)
    if name is None or not shares[name] < GONE:
        return {}
    return {
        "collapsed": f"weight {name!r} is at {shares[name]:.2g} of the norm that it had when training began. If a decay "
        "takes it to zero, it is too large: the model hardly depends on its input, and hypergradients say little. Start "
        "again with a smaller one"
    }
