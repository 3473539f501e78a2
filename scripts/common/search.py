"""Searches by Optuna, which is an optional package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any


def check_optuna(without: str) -> None:
    """Exit with the remedy if Optuna is missing; ``without`` is the option that leaves it out."""
    if find_spec("optuna") is None:
        raise SystemExit(f"Optuna is missing: pip install 'hoptim[tuners]', or leave it out: {without}")


def tpe_study(start: Mapping[str, float], seed: int, pruner: Any, **options: Any) -> Any:
    """A study of Optuna by multivariate TPE, whose first trial is ``start``.

    Args:
        start: the values of the first trial, by name.
        seed: of the sampler.
        pruner: Optuna's pruner.
        options: further options of ``TPESampler``.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate is an experimental option
        sampler = optuna.samplers.TPESampler(multivariate=True, seed=seed, **options)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.enqueue_trial(dict(start))
    return study
