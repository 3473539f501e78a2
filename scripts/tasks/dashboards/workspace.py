"""The panels as a workspace or a report on Weights & Biases, made by W&B's own library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from tasks.dashboards import panels

MANY = 24  # the most hyperparameters to show
GROUPED = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}  # how the runs of a group are drawn
REACHED = ("metrics/test_loss", "metrics/val_loss")


@dataclass(frozen=True, kw_only=True)
class Board:
    """A dashboard on W&B.

    Args:
        entity: the user or team.
        project: the project that the runs are in.
        names: the names under which the runs have logged figures; ``None``: those of a usual run and of any hyperparameter.
        hyperparameters: the names of the hyperparameters, for their histograms.
        settings: dotted names of settings that differ between the runs, to compare the runs by.
        group: show only the runs of this group, such as those of one sweep.
    """

    entity: str
    project: str
    names: Iterable[str] | None = None
    hyperparameters: Sequence[str] = ()
    settings: Sequence[str] = ("outer.lr", "inner.lr")
    group: str | None = None

    def workspace(self) -> ws.Workspace:
        """A view of the project: sections of panels beside the list of runs, which are grouped by sweep and setting."""
        return ws.Workspace(
            entity=self.entity,
            project=self.project,
            name=self.title,
            sections=[ws.Section(name=name, panels=shown, is_open=True) for name, shown in self.sections().items()],
            runset_settings=ws.RunsetSettings(
                filters=self.only,
                groupby=[ws.Metric("Group"), ws.Metric("JobType")],
                pinned_columns=["run:displayName", "run:state", *(f"summary:{name}" for name in REACHED)],
            ),
        )

    def report(self) -> wr.Report:
        """A page of the project, with headings between the panels."""
        runs = wr.Runset(name=self.group or "all runs", filters=self.only, groupby=["run.group", "run.jobType"])
        blocks: list[Any] = [wr.TableOfContents()]
        for name, shown in self.sections().items():
            blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=shown)]
        about = "What a training with hoptim reaches, how its hypergradients went, and what they cost."
        return wr.Report(entity=self.entity, project=self.project, title=self.title, description=about, blocks=blocks)

    @property
    def only(self) -> str:
        """The filter of runs, in the syntax of W&B's library."""
        return f"Metric('Group') = '{self.group}'" if self.group else ""

    @property
    def title(self) -> str:
        return f"hoptim: {self.group}" if self.group else "hoptim"

    def sections(self) -> dict[str, list[Any]]:
        """The panels by section: those of the page, histograms, pictures, and the comparison of a sweep."""
        found = {name: [line_plot(panel) for panel in shown] for name, shown in panels.sections(self.names).items()}
        medians = found.pop("Hyperparameters over time", [])[:MANY]
        found["Hyperparameters over time"] = [*(medians or [every_median()]), *map(histograms, self.hyperparameters[:MANY])]
        found["Comparison of a sweep"] = self.comparison()
        found["Pictures"] = [
            wr.MediaBrowser(title="Pictures", media_keys=["plots/curves", "plots/hyperparameters"], num_columns=1)
        ]
        return found

    def comparison(self) -> list[Any]:
        """The panels that compare the settings of a sweep: what each reaches, with its standard error over seeds."""
        known = {name for shown in panels.sections(self.names).values() for panel in shown for name in panel.lines.values()}
        reached = [name for name in REACHED if name in known]
        bars = [wr.BarPlot(title=f"Final {panels.in_words(name)}", metrics=[name], **GROUPED) for name in reached]
        columns = [wr.Config(setting) for setting in self.settings] + [wr.SummaryMetric(name) for name in reached]
        parallel = wr.ParallelCoordinatesPlot(
            columns=[wr.ParallelCoordinatesPlotColumn(metric=column) for column in columns]
        )
        found = [*bars, parallel, wr.RunComparer(diff_only=True)]
        if len(reached) == 2:
            x, y = (wr.SummaryMetric(name) for name in reached[::-1])
            found.insert(len(bars), wr.ScatterPlot(title="Validation and test loss", x=x, y=y))
        return found


def line_plot(panel: panels.Panel) -> wr.LinePlot:
    """A panel as W&B's line plot. The runs of a group are drawn as their mean, with a band of one standard error."""
    return wr.LinePlot(
        title=panel.title,
        x=panel.axis,
        y=list(panel.lines.values()),
        title_x=panels.AXES[panel.axis],
        title_y=panel.unit,
        log_y=panel.log or None,
        range_y=panel.limits or (None, None),
        plot_type="stacked-area" if panel.stacked else "line",
        **GROUPED,
    )


def every_median() -> wr.LinePlot:
    """The values of small hyperparameters and the medians of large ones in one panel, for runs that are not known."""
    return wr.LinePlot(
        title="Values", x="outer_step", metric_regex="hyperparameters/(.*/(median|[0-9]+)|[^/]+)", title_x="outer steps"
    )


def histograms(name: str) -> wr.LinePlot:
    """The histograms of a hyperparameter over time; W&B draws them only while a single run is shown."""
    return wr.LinePlot(title=f"Histograms of {name}", x="outer_step", y=[f"histograms/{name}"], title_x="outer steps")


def definition(board: ws.Workspace | wr.Report) -> str:
    """What would be sent, as JSON."""
    sent = board._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)  # as save() does
    return json.dumps(json.loads(sent), indent=2)
