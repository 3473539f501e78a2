"""Trackers: hooks that write each hyperstep to a dashboard, to the terminal or to a file of JSON lines.

A tracker is a hook, which is called with each `Record`: `BilevelOptimizer(..., hooks=[WandB(project="mine")])`.

| tracker | what it writes | needs |
|---|---|---|
| `JsonLines` | a file of JSON lines | |
| `Console` | a line on the terminal | |
| `WandB` | a run of Weights & Biases | |
| `TensorBoard` | an event file, by torch's own writer | `pip install 'hoptim[tensorboard]'` |
| `MLflow` | a run of MLflow | `pip install 'hoptim[mlflow]'` |

The packages are imported when a tracker is first used. If several processes train together, only rank 0 writes. The last
three are a `Board`: they also log histograms of the hyperparameters, and take a config at the start and a summary, pictures
and files at the end. None of them ever stops a training: failures only warn.

>>> import tempfile
>>> from hoptim.tracking import JsonLines, WandB
>>> hooks = [WandB(project="mine"), JsonLines(path=f"{tempfile.mkdtemp()}/metrics.jsonl")]

# What a dashboard shows

Each figure is logged once, as `metrics/…` (losses and accuracies), `hypergradient/…` (status, residual, cosine to the last
one, standard error, norms) or `cost/…` (seconds, products). Hyperparameters have histograms, `hyperparameters/<name>`,
and quantiles, such as `hyperparameters/<name>/median`; TensorBoard has only the histograms, MLflow only the quantiles.
`scripts/dashboard` makes a workspace or a report on W&B from these names, or a page of HTML that needs no service.

# Go on with a run

`WandB(id=...)` and `MLflow(id=...)` continue the run with that id, which is its `board.run_id`; `TensorBoard` continues the
run in its folder. After a kill, the rows that were logged after the checkpoint are logged again. TensorBoard shows the later
ones, and MLflow keeps the earlier ones, so that no row is there twice. W&B has both at the same step.
"""

from hoptim.tracking.board import Board
from hoptim.tracking.lines import Console, JsonLines
from hoptim.tracking.mlflow import MLflow
from hoptim.tracking.tensorboard import TensorBoard
from hoptim.tracking.wandb import WandB

__all__ = ["Board", "Console", "JsonLines", "MLflow", "TensorBoard", "WandB"]
