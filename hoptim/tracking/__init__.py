"""Trackers: hooks that write each hyperstep to a dashboard, to the terminal or to a file of JSON lines.

A tracker is a function of the `Record`: `BilevelOptimizer(..., hooks=[WandB(project="mine")])`.

| tracker | what it writes | needs |
|---|---|---|
| `JsonLines` | a file of JSON lines | |
| `Console` | a line on the terminal | |
| `WandB` | a run of Weights & Biases | |
| `TensorBoard` | an event file, by torch's own writer | `pip install 'hoptim[tensorboard]'` |
| `MLflow` | a run of MLflow | `pip install 'hoptim[mlflow]'` |

The packages are imported when a tracker is first used. Where several processes train together, rank 0 alone writes. The last
three are a `Board`: they also log histograms of the hyperparameters, and can be given a config at the start, and a summary,
pictures and files at the end. None of them ever stops a training: what fails is warned of.

>>> import tempfile
>>> from hoptim.tracking import JsonLines, WandB
>>> hooks = [WandB(project="mine"), JsonLines(path=f"{tempfile.mkdtemp()}/metrics.jsonl")]

# What a dashboard shows

Each figure is logged once, as `metrics/…` (losses and accuracies), `hypergradient/…` (status, residual, cosine to the one
before, standard error, norms) or `cost/…` (seconds, products). Hyperparameters have histograms, `hyperparameters/<name>`,
and quantiles, such as `hyperparameters/<name>/median`; TensorBoard has the histograms alone, MLflow the quantiles alone.
`scripts/dashboard` makes a workspace or a report of W&B's from these names, or a page of HTML that needs no service.

# Go on with a run

`WandB(id=...)` and `MLflow(id=...)` continue the run with that id, which `board.run_id` tells, and `TensorBoard` the run in
its folder. After a kill, the rows that were logged after the checkpoint come again. TensorBoard shows the later ones, and
MLflow keeps the earlier ones, so that no row is there twice. W&B has both at the same step.
"""

from hoptim.tracking.board import Board
from hoptim.tracking.console import Console
from hoptim.tracking.json_lines import JsonLines
from hoptim.tracking.mlflow import MLflow
from hoptim.tracking.tensorboard import TensorBoard
from hoptim.tracking.wandb import WandB

__all__ = ["Board", "Console", "JsonLines", "MLflow", "TensorBoard", "WandB"]
