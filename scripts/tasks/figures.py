"""The figures of a run: a row for each outer step, and the result at its end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save as packed

import hoptim
from hoptim.training.record import natural_values, values
from tasks.run import Run

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SAMPLE = 100_000  # the quantiles of a larger tensor are those of about this many of its entries


def figures_of(run: Run, seconds: float) -> dict[str, Any]:
    """A row: sums over its hypersteps, the figures of the last one, and the distribution of each hyperparameter."""
    records = [record.row() for record in run.records]
    run.records.clear()
    row = dict(records[-1]) if records else {"inner_step": run.optimizer.inner_steps}
    row |= {"solve_val_loss": row.pop("val_loss", None), "solve_train_loss": row.pop("train_loss", None)}
    row |= {name: sum(record[name] for record in records) for name in ("products", "hyper_seconds", "moved")}
    row |= {"hypersteps": len(records), "failed": len(records) - row["moved"]}
    row |= {
        "statuses": dict(Counter(record["status"] for record in records)),
        "inner_seconds": seconds - row["hyper_seconds"],
    }
    return {**row, **values(natural_values(run.problem)), "hyperparameters": spreads(run.problem)}


def spreads(problem: hoptim.Problem) -> dict[str, dict[str, Any]]:
    """Mean, minimum, maximum and quantiles of each hyperparameter."""
    found = {}
    for name, tensor in natural_values(problem).items():
        value = tensor.double().flatten()
        sample = value[:: max(1, len(value) // SAMPLE)].sort().values
        quantiles = sample[[round(q * (len(sample) - 1)) for q in QUANTILES]].tolist()
        quantiles[0], quantiles[-1] = value.min().item(), value.max().item()
        found[name] = {"mean": value.mean().item(), "min": quantiles[0], "max": quantiles[-1], "quantiles": quantiles}
    return found


def check_finite(row: Mapping[str, Any], measured: Mapping[str, float]) -> None:
    """Raise FloatingPointError with the remedy if a measured figure is not finite."""
    if all(map(math.isfinite, measured.values())):
        return
    largest = max((spread["max"] for spread in row["hyperparameters"].values()), default=math.nan)
    raise FloatingPointError(
        f"a loss is not finite after outer step {row['outer_step']}, the largest hyperparameter {largest:.3g}: lower "
        "inner.lr, or outer.lr if the hyperparameters ran away"
    )


def result_of(
    cfg: DictConfig, problem: hoptim.Problem, rows: Sequence[Mapping[str, Any]], measured: Mapping[str, float]
) -> tuple[dict[str, Any], bytes]:
    """The content of result.json, and the bytes of hyperparameters.safetensors."""
    statuses: Counter[str] = Counter()
    for row in rows:
        statuses.update(row["statuses"] if "statuses" in row else [row["status"]])
    result = {
        "status": "finished",
        "name": cfg.name,
        "seed": cfg.seed,
        "weights": sum(p.numel() for p in problem.weights().values()),
        "hyperparameters": sum(p.numel() for p in problem.leaves().values()),
        "inner_steps": rows[-1]["inner_step"],
        "statuses": dict(statuses),
        "hypersteps": sum(row.get("hypersteps", 1) for row in rows),
        **{name: sum(row[name] for row in rows) for name in ("moved", "products")},
        **measured,
    }
    with torch.no_grad():
        values = {name: value.contiguous() for name, value in natural_values(problem).items()}
    return result, packed(values)
