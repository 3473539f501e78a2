"""A page of HTML about a run or a sweep. It has all that it needs in it and loads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import compare
import plotly.graph_objects as go
from plotly import io, offline
from safetensors.torch import load_file

from hoptim import Status
from tasks.dashboards import charts, panels
from tasks.dashboards.read import RunFiles

TEMPLATE = Path(__file__).with_name("page.html")
CHART = {
    "displaylogo": False,
    "displayModeBar": "hover",
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}
MANY = 12  # the most hyperparameters to show, since a net has hundreds of tensors
STATES = {"finished": "ok", "running": "remark", "failed": "failed"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """A chart with its title and a note on how to read it."""

    title: str
    chart: go.Figure
    note: str = ""


def of_run(run: RunFiles) -> str:
    """The page of one run."""
    rows, result = panels.logged(run.rows), run.result
    found = panels.sections({name for row in rows for name in row})
    sections = {
        title: [Card(title=panel.title, chart=charts.lines(panel, rows), note=panel.note) for panel in shown]
        for title, shown in found.items()
    }
    name = result.get("name", run.folder.name)
    for part in ("val", "test") if run.baselines else ():
        plain = {label: panels.logged(own) for label, own in run.baselines.items()}
        chart = charts.beside_baselines(rows, plain, f"metrics/{part}_loss", name)
        sections.setdefault("Losses", []).append(
            Card(title=f"{panels.PARTS[part].capitalize()} loss beside plain trainings", chart=chart)
        )
    sections["Hyperparameters over time"] = hyperparameters(run, rows)  # instead of their medians
    body = [tiles(run), problem(result), *(grid(title, cards) for title, cards in sections.items())]
    counts = panels.statuses(run.rows)
    body += [advice(counts), config(run)]
    seed = f"seed {result['seed']}" if "seed" in result else ""
    return page(f"{name} {seed}".strip(), str(run.folder), state(result["status"], counts), body)


def hyperparameters(run: RunFiles, rows: charts.Rows) -> list[Card]:
    """A card for each hyperparameter, or the first: lines for a small one, quantiles for a large one."""
    small = {panel.title: panel for panel in panels.of_hyperparameters({name for row in rows for name in row})}
    file = run.folder / "hyperparameters.safetensors"
    final = {name: value.double().flatten().numpy() for name, value in load_file(file).items()} if file.exists() else {}
    names = panels.hyperparameters(run.rows)
    cards = []
    for name in names[:MANY]:
        values = final.get(name)
        count = f"{len(values):,} entries. " if values is not None and len(values) > 1 else ""
        left = f"{len(names) - MANY} more are not shown." if len(names) > MANY and name == names[MANY - 1] else ""
        chart = charts.lines(small[name], rows) if name in small else charts.spread(run.rows, name, values)
        cards.append(Card(title=name, chart=chart, note=count + left))
    return cards


def tiles(run: RunFiles) -> str:
    """The most important figures of the run."""
    rows, result = run.rows, run.result
    if not rows:
        return '<p class="quiet">There is no row of figures yet.</p>'
    last, solves = rows[-1], [row for row in rows if "status" in row]
    figures = {
        f"{label} loss": f"{last[f'{part}_loss']:.4f}" for part, label in panels.PARTS.items() if f"{part}_loss" in last
    }
    figures |= {"test accuracy": f"{last['test_accuracy']:.3f}"} if "test_accuracy" in last else {}
    seconds = [sum(row.get(f"{kind}_seconds") or 0 for row in rows) for kind in ("inner", "hyper")]
    figures["inner steps"] = f"{last['inner_step']:,}"
    if solves:
        hypersteps, moved, products = (sum(values) for values in zip(*map(panels.solved, solves), strict=True))
        figures["hypersteps that moved"] = f"{moved:,} of {hypersteps:,}"
        figures["products"] = f"{products:,} ({products / hypersteps:.3g} each)"
    retrained = {key: result[f"retrained_{key}"] for key in ("test_loss", "test_accuracy") if f"retrained_{key}" in result}
    figures |= {f"{panels.in_words(key)} after retraining": f"{value:.4f}" for key, value in retrained.items()}
    figures |= {key: f"{result[key]:,}" for key in ("weights", "hyperparameters") if key in result}
    if seconds[0]:
        figures["cost in plain trainings"] = f"{sum(seconds) / seconds[0]:.2f}"
        figures["seconds"] = f"{sum(seconds):.1f}"
    shown = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in figures.items()
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def state(status: str, counts: Mapping[str, int]) -> str:
    """The chip that says how a run ended. One in which a hyperstep failed is not green, and red if most did.

    >>> state("finished", {"STEP_TOO_LARGE": 61})
    '<span class="chip failed">finished, 61 of 61 hypersteps failed</span>'
    >>> state("finished", {"FINISHED": 6})
    '<span class="chip ok">finished</span>'
    """
    failed = sum(count for name, count in counts.items() if Status[name].kind == "failed")
    kind, words = STATES.get(status, "remark"), status
    if failed:
        words += f", {failed:,} of {sum(counts.values()):,} hypersteps failed"
        kind = "failed" if kind == "failed" or 2 * failed > sum(counts.values()) else "remark"
    return f'<span class="chip {kind}">{escape(words)}</span>'


def problem(result: Mapping[str, Any]) -> str:
    """The error of a run that failed."""
    return f'<p class="error">{escape(result["error"])}</p>' if "error" in result else ""


def advice(counts: Mapping[str, int]) -> str:
    """How the solves ended, and what to do about those that were not ok."""
    if not counts:
        return ""
    rows = []
    for status in Status:
        if counts.get(status.name):
            words = f"<td>{counts[status.name]}</td><td>{escape(status.message)}</td>"
            rows.append(f'<tr><td><span class="chip {status.kind}">{status.kind}</span> {status.name}</td>{words}</tr>')
    head = "<tr><th>status</th><th>solves</th><th>what it means</th></tr>"
    return f'<h2>How the solves ended</h2><div class="card wide"><table>{head}{"".join(rows)}</table></div>'


def config(run: RunFiles) -> str:
    """The config of the run, which unfolds."""
    return f"<details><summary>Config</summary><pre>{escape(run.config)}</pre></details>" if run.config else ""


def of_sweep(root: Path) -> str:
    """The page of all runs below a folder. Runs that differ only in the seed are a group."""
    runs = compare.read(root)
    groups, left = compare.grouped(runs)
    labels = short_names(list(groups))
    done = {
        labels[group]: [run for run in members if run.result["status"] == "finished"] for group, members in groups.items()
    }
    done = {label: members for label, members in done.items() if members}
    rows = {label: [panels.logged(run.rows) for run in members] for label, members in done.items()}
    sections = curves(rows)
    body = [summary_table(groups, labels), grid("What each setting reaches", final(done))]
    body += [grid(f"{title}, mean ± standard error", cards) for title, cards in sections.items()]
    body += [run_table(groups, labels)]
    body += [f'<p class="quiet">left out: {escape(words)}</p>' for words in left]
    failed, counts = any(run.result["status"] == "failed" for run in runs), Counter[str]()
    for run in runs:
        counts.update(run.result.get("statuses", {}))
    title = f"Sweep {root.name}: {len(runs)} runs of {len(groups)} settings"
    return page(title, str(root), state("failed" if failed else "finished", counts), body)


def curves(rows: Mapping[str, Sequence[charts.Rows]]) -> dict[str, list[Card]]:
    """The cards by section, one for each figure that is not zero in every run."""
    every = [row for runs in rows.values() for own in runs for row in own]
    names = {name for row in every for name, value in row.items() if value} - {panels.STATUS}
    sections: dict[str, list[Card]] = {}
    for title, shown in panels.sections(names).items():
        cards = [
            Card(
                title=f"{panel.title}: {label}" if len(panel.lines) > 1 else panel.title,
                chart=charts.compared(rows, name, panel.axis),
                note=panel.note if len(panel.lines) == 1 else "",
            )
            for panel in shown
            for label, name in panel.lines.items()
            if name in names
        ]
        sections[title] = cards[:MANY]
    return sections


def final(done: Mapping[str, Sequence[compare.Run]]) -> list[Card]:
    """How all runs ended: their losses, costs and statuses."""
    cards = []
    for part in ("test", "val"):
        key = f"{part}_loss"
        if values := {label: [run.result[key] for run in runs if key in run.result] for label, runs in done.items()}:
            name = f"{panels.PARTS[part]} loss"
            chart = charts.dots({label: found for label, found in values.items() if found}, name)
            cards.append(Card(title=f"Final {name}", chart=chart, note="A dot is a seed; the bar is mean ± standard error."))
    reached = {
        label: ([run.cost for run in runs], [run.result.get("test_loss") for run in runs]) for label, runs in done.items()
    }
    cards.append(
        Card(title="Cost and test loss", chart=charts.costs(reached, "test loss"), note="Down and to the left is better.")
    )
    counts = {
        label: sum((Counter(run.result.get("statuses", {})) for run in runs), Counter()) for label, runs in done.items()
    }
    if any(counts.values()):
        cards.append(Card(title="How the solves ended", chart=charts.counted(counts)))
    return cards


def summary_table(groups: Mapping[str, Sequence[compare.Run]], labels: Mapping[str, str]) -> str:
    """A table of mean and standard error of each figure, with the best value of each column in bold."""
    entries = {label: compare.summary(groups[group]) for group, label in labels.items()}
    finished = [label for label, entry in entries.items() if entry["runs"]]
    colours = {label: charts.COLOURS[place % len(charts.COLOURS)] for place, label in enumerate(finished)}
    columns = list(dict.fromkeys(key for entry in entries.values() for key in entry if key in compare.FIGURES))
    means = {key: [entry[key][0] for entry in entries.values() if key in entry] for key in columns}
    best = {key: (min if key.endswith("loss") else max)(values) for key, values in means.items()}
    head = "".join(f"<th>{escape(panels.in_words(key))}</th>" for key in columns)
    lines = [f"<tr><th>setting</th><th>runs</th>{head}<th>cost in trainings</th><th>moved</th></tr>"]
    for label, entry in entries.items():
        failed = f' <span class="chip failed">{entry["failed"]} failed</span>' if entry["failed"] else ""
        cells = [f"{entry['runs']}{failed}"]
        for key in columns:
            words = compare.pair(entry.get(key), "{:.3f}")
            cells.append(f"<b>{words}</b>" if key in entry and entry[key][0] == best[key] else words)
        moved = entry.get("moved", [0, 0])
        cells += [
            f"{entry['trainings']:.2f}" if "trainings" in entry else "",
            f"{moved[0]} of {moved[1]}" if moved[1] else "none",
        ]
        dot = f'<span class="dot" style="background: {colours[label]}"></span>' if label in colours else ""
        lines.append(f"<tr><td>{dot}{escape(label)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="card wide"><table>{"".join(lines)}</table></div>'


def run_table(groups: Mapping[str, Sequence[compare.Run]], labels: Mapping[str, str]) -> str:
    """A table of all runs with their states and errors."""
    lines = ["<tr><th>setting</th><th>seed</th><th>state</th><th>test loss, or error</th></tr>"]
    for group, runs in groups.items():
        for run in runs:
            status = run.result["status"]
            loss = f"{run.result['test_loss']:.4f}" if status == "finished" else escape(run.result.get("error", ""))
            chip = state(status, run.result.get("statuses", {}))
            lines.append(
                f"<tr><td>{escape(labels[group])}</td><td>{escape(run.seed)}</td><td>{chip}</td><td>{loss}</td></tr>"
            )
    return f'<details><summary>All runs</summary><div class="card wide"><table>{"".join(lines)}</table></div></details>'


def short_names(groups: Sequence[str]) -> dict[str, str]:
    """A short name for each group: its name without the parts that all of them have in common.

    >>> short_names(["iris/outer_steps=40", "iris_blog/outer_steps=40"])
    {'iris/outer_steps=40': 'iris', 'iris_blog/outer_steps=40': 'iris_blog'}
    """
    parts = {group: group.split("/") for group in groups}
    common = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    return {group: "/".join(part for part in found if part not in common) or group for group, found in parts.items()}


def grid(title: str, cards: Sequence[Card]) -> str:
    """A section with the charts of its cards."""
    shown = []
    for card in cards:
        note = f'<p class="quiet">{escape(card.note)}</p>' if card.note else ""
        drawn = io.to_html(card.chart, full_html=False, include_plotlyjs=False, config=CHART)
        shown.append(f'<div class="card"><h3>{escape(card.title)}</h3>{drawn}{note}</div>')
    return f'<h2>{escape(title)}</h2><div class="grid">{"".join(shown)}</div>' if shown else ""


def page(title: str, where: str, chip: str, body: Sequence[str]) -> str:
    """The whole page, which includes plotly's script."""
    words = {"title": escape(title), "where": escape(where), "chip": chip, "body": "\n".join(body)}
    return Template(TEMPLATE.read_text()).substitute(words, plotly=offline.get_plotlyjs())
