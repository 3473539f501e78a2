"""Searches by Optuna, which is an optional package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any


def check_optuna(without: str) -> None:
    """Exit with the remedy if Optuna is missing; ``without`` is the option that leaves it out."""
    if find_spec("optuna") is None:
        raise SystemExit(f"Optuna is missing: pip install '.[tuners]', or leave it out: {without}")


def tpe_sampler(seed: int, **options: Any) -> Any:
    """Optuna's multivariate TPE; ``options`` are further ones of ``TPESampler``."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate is an experimental option
        return optuna.samplers.TPESampler(multivariate=True, seed=seed, **options)


def gp_sampler(seed: int, **options: Any) -> Any:
    """Optuna's Gaussian process; ``options`` are further ones of ``GPSampler``."""
    import optuna

    return optuna.samplers.GPSampler(seed=seed, **options)


def study_from(start: Mapping[str, float], sampler: Any, pruner: Any) -> Any:
    """A study of Optuna whose first trial is ``start``: the values by name."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.enqueue_trial(dict(start))
    return study
