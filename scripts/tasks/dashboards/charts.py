"""The charts of the page, drawn by plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hoptim import Status
from tasks.dashboards.panels import AXES, STATUS, Panel, in_words

INK, GRID, GREY = "#1f2933", "#e6e9ee", "#9aa5b1"
PARTS = {"train": "#8a94a3", "validation": "#2563ab", "test": "#d1651a"}
COLOURS = ("#2563ab", "#d1651a", "#2f855a", "#7b4ea3", "#b7791f", "#0e7490", "#c2417c", "#5f6b7a")
DASHES = ("solid", "dash", "dot")
FEW = 6  # more groups have no legend in each chart, for lack of room: the page's table is their legend
KINDS = {"ok": ("#2f855a", "circle"), "remark": ("#c9860a", "diamond"), "failed": ("#c53030", "x")}
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # those in the rows that scripts/train.py writes
Rows = Sequence[Mapping[str, Any]]


def figure(chart: go.Figure, *, x: str, y: str, log: tuple[float, float] | None = None, legend: bool = True) -> go.Figure:
    """Set the look that all charts share. ``log`` has the lowest and the highest value, for a logarithmic vertical axis."""
    chart.update_layout(
        template="plotly_white",
        height=300,
        margin={"l": 64, "r": 16, "t": 34, "b": 44},
        hovermode="x unified",
        font={"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12, "color": INK},
        showlegend=legend,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        colorway=COLOURS,
    )
    chart.update_xaxes(title=x, gridcolor=GRID, zeroline=False)
    chart.update_yaxes(title=y + (", log scale" if log else ""), gridcolor=GRID, zeroline=False)
    if log:
        decades = np.log10(log[1] / log[0])
        ticks = "D2" if decades < 1.5 else max(1, round(decades / 6))
        chart.update_yaxes(type="log", dtick=ticks, tickformat="~g", minor={"showgrid": False})
    return chart


def lines(panel: Panel, rows: Rows) -> go.Figure:
    """The chart of a panel for one run, whose rows have their figures under the logged names."""
    if panel.lines == {"status": STATUS}:
        return statuses(rows)
    chart = go.Figure()
    for place, (label, name) in enumerate(panel.lines.items()):
        found = [(row[panel.axis], row[name]) for row in rows if name in row and panel.axis in row]
        if not found:
            continue
        colour = PARTS.get(label, COLOURS[place % len(COLOURS)])
        dash = "dot" if label == "indirect" else DASHES[place // len(COLOURS) % len(DASHES)]
        line = {"color": colour, "width": 1.8, "dash": dash}
        x, y = zip(*found, strict=True)
        if panel.log and not any(y):
            label += " (zero)"
        stack = {"stackgroup": "all", "line": {**line, "width": 0.8}} if panel.stacked else {"line": line}
        chart.add_scatter(
            x=x, y=y, name=label, mode="lines" if len(found) > 1 else "markers", hovertemplate="%{y:.4g}", **stack
        )
    values = [value for trace in chart.data for value in trace.y if value or not panel.log]
    log = (min(values), max(values)) if panel.log and values and max(values) > 3 * min(values) > 0 else None
    figure(chart, x=AXES[panel.axis], y=panel.unit, log=log, legend=len(chart.data) > 1)
    if panel.limits:
        low, high = panel.limits
        margin = 0.04 * (high - low)
        chart.update_yaxes(range=[low - margin, high + margin])
    elif panel.from_zero and not panel.stacked and not log:
        begin_at_zero(chart, values)
    return chart


def begin_at_zero(chart: go.Figure, values: Sequence[float]) -> None:
    """Let the vertical axis begin at zero if there are no negative values, and leave room above the largest one."""
    if values and min(values) >= 0 and max(values) > 0:
        chart.update_yaxes(range=[0, 1.08 * max(values)])


def statuses(rows: Rows) -> go.Figure:
    """How the solves of each outer step ended: a row for each status, in the colour and with the marker of its kind."""
    chart = go.Figure()
    order = [status.name for status in Status if any(status.name in row["statuses"] for row in rows)]
    for name in order:
        colour, symbol = KINDS[Status[name].kind]
        those = [row for row in rows if name in row["statuses"]]
        details = [row.get("hypergradient/detail", "") if row["hypergradient/status"] == name else "" for row in those]
        chart.add_scatter(
            x=[row["outer_step"] for row in those],
            y=[name] * len(those),
            mode="markers",
            name=Status[name].kind,
            marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.8},
            text=[f"{row['statuses'][name]} × {detail}" for row, detail in zip(those, details, strict=True)],
            hovertemplate="%{y} %{text}<extra></extra>",
        )
    figure(chart, x=AXES["outer_step"], y="", legend=False)
    chart.update_layout(hovermode="closest")
    chart.update_yaxes(categoryorder="array", categoryarray=order[::-1], automargin=True, range=[-0.6, len(order) - 0.4])
    return chart


def beside_baselines(rows: Rows, baselines: Mapping[str, Rows], name: str, title: str) -> go.Figure:
    """One metric of the run and of the plain trainings beside it."""
    chart = go.Figure()
    for place, (label, own) in enumerate({title: rows, **baselines}.items()):
        found = [(row["inner_step"], row[name]) for row in own if name in row]
        if found:
            x, y = zip(*found, strict=True)
            look = (
                {"color": COLOURS[0], "width": 2.4}
                if place == 0
                else {"color": COLOURS[place % 8], "dash": "dash", "width": 1.4}
            )
            chart.add_scatter(x=x, y=y, name=label, mode="lines", line=look, hovertemplate="%{y:.4g}")
    return figure(chart, x=AXES["inner_step"], y=in_words(name))


def spread(rows: Rows, name: str, final: np.ndarray | None) -> go.Figure:
    """A hyperparameter over time, as quantiles of its entries, and the histogram of its final values if they are known."""
    bands = np.array([row["hyperparameters"][name]["quantiles"] for row in rows]).T
    several, ended = bool((bands[0] < bands[-1]).any()), final is not None and final.size > 1
    steps, middle = [row["outer_step"] for row in rows], len(bands) // 2
    widths = [0.8, 0.2] if ended else [1.0]
    chart = make_subplots(cols=len(widths), shared_yaxes=True, horizontal_spacing=0.05, column_widths=widths)
    for low in range(middle if several else 0):
        label = f"{QUANTILES[low]:.0%} to {QUANTILES[-1 - low]:.0%}"
        fill = f"rgba(37, 99, 171, {0.12 + 0.12 * low:.2f})"
        quiet = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": label, "row": 1, "col": 1}
        chart.add_scatter(x=steps, y=bands[low], showlegend=False, **quiet)
        chart.add_scatter(x=steps, y=bands[-1 - low], fill="tonexty", fillcolor=fill, name=label, **quiet)
    look = {"line": {"color": COLOURS[0], "width": 2}, "mode": "lines", "hovertemplate": "%{y:.4g}", "row": 1, "col": 1}
    chart.add_scatter(x=steps, y=bands[middle], name="median" if several else "value", **look)
    low, high = (float(bands.min()), float(bands.max())) if several else (bands[middle].min(), bands[middle].max())
    log = (low, high) if high > 3 * low > 0 else None
    figure(chart, x=AXES["outer_step"], y="value", log=log, legend=several)
    if ended:
        counts, edges = histogram(final, log is not None)
        centres = np.sqrt(edges[:-1] * edges[1:]) if log else (edges[:-1] + edges[1:]) / 2
        outline = {"color": COLOURS[0], "width": 1, "shape": "vhv"}
        hover = "%{x} entries<extra></extra>"
        look = {
            "mode": "lines",
            "fill": "tozerox",
            "line": outline,
            "showlegend": False,
            "hovertemplate": hover,
            "row": 1,
            "col": 2,
        }
        chart.add_scatter(x=counts, y=centres, name="at the end", **look)
        chart.update_xaxes(title="entries at the end", row=1, col=2)
        chart.update_yaxes(title="", row=1, col=2)
    return chart


def histogram(values: np.ndarray, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of forty bins, equally wide on the axis."""
    low, high = float(values.min()), float(values.max())
    if not log or low <= 0 or low == high:
        return np.histogram(values, bins=40)
    return np.histogram(values, bins=np.geomspace(low, high, 41))


def compared(groups: Mapping[str, Sequence[Rows]], name: str, axis: str) -> go.Figure:
    """A figure of several groups of runs: the mean of each group, with a band of one standard error."""
    chart, everything, ends = go.Figure(), [], []
    for place, (label, runs) in enumerate(groups.items()):
        found = [{row[axis]: row[name] for row in rows if name in row and axis in row} for rows in runs]
        steps = sorted(set.intersection(*(set(run) for run in found))) if found else []
        if not steps:
            continue
        values, colour = np.array([[run[step] for step in steps] for run in found]), COLOURS[place % len(COLOURS)]
        look = {"color": colour, "width": 2, "dash": DASHES[place // len(COLOURS) % len(DASHES)]}
        mean, error = (
            values.mean(0),
            values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(len(steps)),
        )
        if len(values) > 1:
            quiet = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "legendgroup": label}
            chart.add_scatter(x=steps, y=mean - error, **quiet)
            chart.add_scatter(x=steps, y=mean + error, fill="tonexty", fillcolor=faint(colour), **quiet)
        chart.add_scatter(x=steps, y=mean, name=label, legendgroup=label, mode="lines", line=look, hovertemplate="%{y:.4g}")
        everything += [float(value) for value in mean + error]
        ends.append(float(mean[-1]))
    loss, low, high = name.endswith("_loss"), min(everything, default=0.0), max(everything, default=0.0)
    log = (low, high) if not loss and high > 20 * low > 0 else None
    figure(chart, x=AXES[axis], y=in_words(name), log=log, legend=len(groups) <= FEW)
    if loss and ends and high > 3 * np.median(ends) > 0:
        chart.update_yaxes(range=[0, 3 * np.median(ends)])  # so that a high start or overfitting does not flatten the rest
    elif not log and not name.endswith("accuracy"):
        begin_at_zero(chart, everything)
    return chart


def faint(colour: str) -> str:
    """The colour of the band around a line of this colour."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.14)"


def dots(groups: Mapping[str, Sequence[float]], unit: str) -> go.Figure:
    """A dot for each run, and the mean and standard error of each group."""
    chart = go.Figure()
    for place, (label, values) in enumerate(groups.items()):
        colour = COLOURS[place % len(COLOURS)]
        chart.add_scatter(
            x=list(values),
            y=[label] * len(values),
            mode="markers",
            name=label,
            hovertemplate="%{x:.4g}<extra></extra>",
            marker={"color": colour, "size": 8, "opacity": 0.45},
        )
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        chart.add_scatter(
            x=[float(np.mean(values))],
            y=[label],
            mode="markers",
            name=f"mean of {label}",
            error_x={"type": "data", "array": [error], "thickness": 1.6, "width": 6},
            marker={"color": colour, "size": 12, "symbol": "line-ns-open", "line": {"width": 3}},
            hovertemplate="mean %{x:.4g}<extra></extra>",
        )
    figure(chart, x=unit, y="", legend=False)
    chart.update_layout(hovermode="closest", height=max(300, 80 + 26 * len(groups)))
    chart.update_yaxes(automargin=True, autorange="reversed")
    return chart


def costs(groups: Mapping[str, tuple[Sequence[float], Sequence[float]]], unit: str) -> go.Figure:
    """What each run reaches against its cost in plain trainings."""
    chart = go.Figure()
    for place, (label, (cost, reached)) in enumerate(groups.items()):
        chart.add_scatter(
            x=list(cost),
            y=list(reached),
            mode="markers",
            name=label,
            hovertemplate="%{x:.3f} trainings, %{y:.4g}",
            marker={"color": COLOURS[place % len(COLOURS)], "size": 9, "opacity": 0.7},
        )
    figure(chart, x="cost in plain trainings", y=unit, legend=len(groups) <= FEW)
    chart.update_layout(hovermode="closest")
    return chart


def counted(groups: Mapping[str, Mapping[str, int]]) -> go.Figure:
    """How many solves of each group ended in each status."""
    chart, labels = go.Figure(), list(groups)
    kinds: dict[str, int] = {}
    for status in Status:
        counts = [groups[label].get(status.name, 0) for label in labels]
        if any(counts):
            colour, shade = KINDS[status.kind][0], kinds.get(status.kind, 0)
            kinds[status.kind] = shade + 1
            chart.add_bar(
                y=labels,
                x=counts,
                orientation="h",
                name=f"{status.name} ({status.kind})",
                hovertemplate="%{x}",
                marker={"color": colour, "opacity": max(0.9 - 0.25 * shade, 0.3)},
            )
    figure(chart, x="hypersteps", y="")
    chart.update_layout(barmode="stack", hovermode="closest", height=max(300, 80 + 26 * len(groups)))
    chart.update_yaxes(automargin=True, autorange="reversed")
    return chart
