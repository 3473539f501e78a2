"""Make a dashboard of a run or a sweep: a page of HTML that needs no service, or a workspace or report on W&B.

    scripts/dashboard runs/iris/seed=0                       a page about a run: dashboard.html in its folder
    scripts/dashboard runs/study                             a page about a sweep
    scripts/dashboard --wandb ENTITY/PROJECT                 a workspace on W&B, for runs of any kind
    scripts/dashboard runs/study --wandb ENTITY/PROJECT      the same, for what the runs in a folder have logged
    scripts/dashboard --wandb ENTITY/PROJECT --report        a report on W&B
    scripts/dashboard --wandb ENTITY/PROJECT --dry-run       print what would be sent; needs no account

Runs get to W&B by WANDB_MODE=online, or afterwards by `wandb sync RUN/wandb/offline-run-*`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from hoptim.tracking.board import flat
from tasks.dashboards import panels
from tasks.dashboards.read import is_run, read_run

if TYPE_CHECKING:
    from tasks.dashboards.workspace import Board

NEEDED = {"dashboard": ("plotly", "safetensors"), "workspace": ("wandb_workspaces",)}
UNCOMPARED = ("seed", "name", "resume", "plots", "root", "threads", "checkpoint_every", "baselines", "hoptim.tracker")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="scripts/dashboard", description=__doc__, formatter_class=style)
    parser.add_argument("folder", type=Path, nargs="?", help="the folder of a run or a sweep")
    parser.add_argument("--output", type=Path, help="the file of the page; default: dashboard.html in the folder")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="make a workspace of this W&B project instead of the page")
    parser.add_argument("--report", action="store_true", help="make a report instead of a workspace")
    parser.add_argument("--group", help="show only the runs of this group; a sweep's group is the name of its folder")
    parser.add_argument("--dry-run", action="store_true", help="print the definition that would be sent to W&B")
    options = parser.parse_args(arguments)
    if options.wandb is None and (options.report or options.dry_run or options.group):
        parser.error("--report, --group and --dry-run are about W&B: give --wandb ENTITY/PROJECT as well")
    if options.wandb is None and options.folder is None:
        parser.error("give the folder of a run or a sweep, or --wandb ENTITY/PROJECT")
    if options.wandb is not None and [bool(part) for part in options.wandb.split("/")] != [True, True]:
        parser.error(f"--wandb {options.wandb}: give the user or team and its project, as in me/hoptim")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder: give that of a run, such as runs/iris/seed=0, or of a sweep")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    extra = "workspace" if options.wandb else "dashboard"
    if missing := [package for package in NEEDED[extra] if find_spec(package) is None]:
        sys.exit(f"{' and '.join(missing)} not installed: in a checkout of hoptim, pip install '.[{extra}]'")
    if options.wandb:
        to_wandb(options)
    else:
        write_page(options.folder, options.output or options.folder / "dashboard.html")


def write_page(folder: Path, output: Path) -> None:
    """Write the page of the run or the sweep in the folder."""
    from tasks.dashboards import page

    if not is_run(folder) and not any(runs(folder)):
        sys.exit(f"no run below {folder}: there is neither a metrics.jsonl nor a result.json")
    output.write_text(page.of_run(read_run(folder)) if is_run(folder) else page.of_sweep(folder))
    print(f"wrote {output}")


def to_wandb(options: argparse.Namespace) -> None:
    """Send the workspace or the report to W&B, or print what would be sent."""
    from tasks.dashboards.workspace import definition

    board = planned(options)
    made = board.report() if options.report else board.workspace()
    if options.dry_run:
        print(definition(made))
        return
    import wandb

    try:
        wandb.Api()
    except wandb.errors.UsageError as error:
        sys.exit(f"{error} Or give --dry-run to see what would be sent.")
    made.save()  # prints where it is


def planned(options: argparse.Namespace) -> Board:
    """The dashboard on W&B, for what the runs in the folder have logged, or for runs of any kind."""
    from tasks.dashboards.workspace import Board

    entity, project = options.wandb.split("/")
    if options.folder is None:
        return Board(entity=entity, project=project, group=options.group)
    found = [read_run(folder) for folder in runs(options.folder)]
    if not found:
        sys.exit(f"no run below {options.folder}: there is neither a metrics.jsonl nor a result.json")
    return Board(
        entity=entity,
        project=project,
        group=options.group,
        names={name for run in found for row in panels.logged(run.rows) for name in row},
        hyperparameters=list(dict.fromkeys(name for run in found for name in panels.large(run.rows))),
        settings=different([run.config for run in found]),
    )


def runs(folder: Path) -> Iterator[Path]:
    """The folders of all runs in a folder, without the plain trainings beside each."""
    found = sorted({path.parent for name in ("metrics.jsonl", "result.json") for path in folder.rglob(name)})
    return (path for path in found if path.parent.name != "baselines")


def different(configs: list[str]) -> list[str]:
    """The settings in which these configs differ, without the seed, the name and others that are not compared.

    >>> different(["outer: {lr: 0.1}", "outer: {lr: 0.2}"])
    ['outer.lr']
    """
    from omegaconf import OmegaConf

    values: dict[str, set[str]] = {}
    for text in configs:
        config: Any = OmegaConf.to_container(OmegaConf.create(text)) if text else {}
        for name, value in flat(config).items():
            values.setdefault(name, set()).add(str(value))
    return [name for name, seen in values.items() if len(seen) > 1 and not name.startswith(UNCOMPARED)]


if __name__ == "__main__":
    main()
