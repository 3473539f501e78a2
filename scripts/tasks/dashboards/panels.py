"""The panels of a dashboard, for the page and for W&B, with the names under which hoptim.tracking logs their figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hoptim.tracking.board import figures

PARTS = {"train": "train", "val": "validation", "test": "test"}
STATUS, FAILED = "hypergradient/status_level", "hypergradient/failed"
USUAL = {"metrics/train_loss", "metrics/val_loss", "metrics/test_loss"}
AXES = {"inner_step": "inner steps", "outer_step": "outer steps"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart of lines.

    Args:
        title: what it shows.
        lines: for each line, its name in the legend and the name under which its figures are logged.
        unit: the label of the vertical axis.
        axis: the horizontal axis, ``inner_step`` or ``outer_step``.
        log: whether the vertical axis is logarithmic.
        limits: of the vertical axis, if they are known.
        stacked: whether the lines are parts of a whole.
        from_zero: whether a vertical axis that is not logarithmic begins at zero.
        note: what to look for, in a sentence.
    """

    title: str
    lines: Mapping[str, str]
    unit: str
    axis: str = "outer_step"
    log: bool = False
    limits: tuple[float, float] | None = None
    stacked: bool = False
    from_zero: bool = True
    note: str = ""


HYPERGRADIENT = (
    Panel(
        title="Status of each solve",
        lines={"status": STATUS},
        unit="0 ok, 1 remark, 2 failed",
        limits=(0.0, 2.0),
        note="After a failed solve the hyperparameters stay as they are.",
    ),
    Panel(
        title="Residual of the solve",
        lines={"‖g − Aᵀx‖ / ‖g‖": "hypergradient/residual"},
        unit="relative",
        log=True,
        note="Far below 1 the linear system is solved. A few terms, as by default, leave it near 0.1 to 0.5.",
    ),
    Panel(
        title="Cosine to the last hypergradient",
        lines={"cosine": "hypergradient/cosine_to_last"},
        unit="cosine",
        limits=(-1.0, 1.0),
        note="Near 1 they agree; near 0 noise dominates; below 0 the steps may be too large.",
    ),
    Panel(
        title="Standard error over validation losses",
        lines={"standard error": "hypergradient/standard_error"},
        unit="relative to the norm",
        note="Above 1 the hypergradient can't be told from noise. It needs several validation losses.",
    ),
    Panel(
        title="Norms of the hypergradient",
        lines={
            "hypergradient": "hypergradient/hypergradient_norm",
            "direct": "hypergradient/direct_norm",
            "indirect": "hypergradient/indirect_norm",
        },
        unit="norm",
        log=True,
        note="The hypergradient is the sum of a direct and an indirect term.",
    ),
    Panel(title="Step size of the solver", lines={"step size": "hypergradient/step_size"}, unit="α", log=True),
)
COST = (
    Panel(
        title="Seconds of each outer step",
        lines={"training": "cost/inner_seconds", "hypergradients": "cost/hyper_seconds"},
        unit="seconds",
        stacked=True,
    ),
    Panel(title="Products of each outer step", lines={"products with A": "cost/products"}, unit="products"),
    Panel(title="Hypersteps of each outer step", lines={"all": "cost/hypersteps", "failed": FAILED}, unit="hypersteps"),
)


def metrics(names: Iterable[str]) -> list[Panel]:
    """A panel for each kind of metric among the logged names: losses first, then accuracies, then all others."""
    kinds: dict[str, dict[str, str]] = {}
    for name in names:
        section, _, key = name.partition("/")
        part, _, kind = key.partition("_")
        if section == "metrics" and kind and part in PARTS:
            kinds.setdefault(kind, {})[PARTS[part]] = name
        elif section == "metrics":
            kinds[key] = {key: name}
    order = {label: place for place, label in enumerate(PARTS.values())}
    return [
        Panel(
            title=kind.replace("_", " ").capitalize(),
            lines=dict(sorted(kinds[kind].items(), key=lambda item: order.get(item[0], 0))),
            unit=kind.replace("_", " "),
            axis="inner_step",
            from_zero=kind == "loss",
        )
        for kind in sorted(kinds, key=lambda kind: (kind != "loss", kind != "accuracy", kind))
    ]


def of_hyperparameters(names: Iterable[str]) -> list[Panel]:
    """A panel for each hyperparameter among the logged names: a line for each number of a small one, else the median.

    >>> found = of_hyperparameters(["hyperparameters/decay", "hyperparameters/mix/1", "hyperparameters/mix/0"])
    >>> [(panel.title, list(panel.lines)) for panel in found]
    [('decay', ['decay']), ('mix', ['mix[0]', 'mix[1]'])]
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        section, _, key = name.partition("/")
        base, _, end = key.rpartition("/")
        if section == "hyperparameters" and (end == "median" or end.isdigit() or not base):
            title, label = (
                (f"Median of {base}", end) if end == "median" else (base or key, f"{base}[{end}]" if base else key)
            )
            found.setdefault(title, {})[label] = name
    order = {title: dict(sorted(lines.items(), key=lambda line: (len(line[0]), line[0]))) for title, lines in found.items()}
    return [Panel(title=title, lines=order[title], unit="value", log=True) for title in sorted(order)]


def sections(names: Iterable[str] | None = None) -> dict[str, list[Panel]]:
    """The sections of a dashboard and their panels.

    Args:
        names: the names under which the runs have logged figures; panels without any of them are left out. ``None``: the
            names of a usual run.
    """
    known = set(USUAL if names is None else names)
    found = {"Losses": metrics(known), "Hypergradients": list(HYPERGRADIENT)}
    found |= {"Hyperparameters over time": of_hyperparameters(known), "Cost": list(COST)}
    if names is None:
        return found
    shown = {title: [panel for panel in panels if known & set(panel.lines.values())] for title, panels in found.items()}
    return {title: panels for title, panels in shown.items() if panels}


def logged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` under the names that trackers log, and how many hypersteps ended in which status."""
    return [{**figures(row), "statuses": statuses([row])} for row in rows]


def statuses(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How many hypersteps ended in which status. A row of a single hyperstep has only its own."""
    return sum((Counter(row.get("statuses") or [row["status"]]) for row in rows if "status" in row), Counter())


def solved(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """The hypersteps of a row, how many of them moved, and their products."""
    return row.get("hypersteps", 1), row["moved"], row["products"]


def in_words(name: str) -> str:
    """The name of a figure for people.

    >>> in_words("metrics/val_loss")
    'validation loss'
    """
    part, _, rest = name.rpartition("/")[2].partition("_")
    return f"{PARTS.get(part, part)} {rest}".replace("_", " ").strip()


def hyperparameters(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the hyperparameters in the rows."""
    return list(rows[-1].get("hyperparameters", {})) if rows else []


def large(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of those that have histograms."""
    return [name for name in hyperparameters(rows) if f"hyperparameters/{name}/median" in rows[-1]]
