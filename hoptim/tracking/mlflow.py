"""A tracker that logs to MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hoptim.linalg.vectors import Tree
from hoptim.tracking.board import Board, figures, flat, quantiles, require, steps, warn_of_failures

PARAMETERS, METRICS = 100, 1000  # how many MLflow takes in one call
LENGTH = 500  # how long a parameter's value may be, the smallest limit of any version of MLflow


@dataclass(kw_only=True)
class _Session:
    """A run that is being written: its client, its id, and its last inner step when it was opened."""

    client: Any
    run_id: str
    last: int = -1


_open: dict[MLflow, _Session | None] = {}  # None for a run that has failed; the training goes on without it


@dataclass(frozen=True, kw_only=True)
class MLflow(Board):
    """MLflow: the figures of each hyperstep against inner steps, and quantiles of each hyperparameter; it has no histograms.

    It logs to the run that was started by ``mlflow.start_run()``, or opens one. A run that is continued keeps its rows.
    After a failure nothing more is sent, since a server that does not answer would delay each row by minutes.

    Args:
        uri: where MLflow keeps its runs; ``None``: ``MLFLOW_TRACKING_URI``, else MLflow's own default, ``sqlite:///mlflow.db``.
        project: the MLflow experiment, default ``hoptim``.
        name: the run's name; ``None`` lets MLflow choose.
        group: the group of the run, such as a sweep, as the tag ``group``.
        job_type: the kind of run within its group, as the tag ``job_type``.
        tags: further tags, ``"key=value"``, or ``"key"`` for the value ``true``; default: none.
        id: the id of a run to continue; ``None`` for a new one.
        histograms: log five quantiles of every hyperparameter tensor, default true.

    Raises:
        ImportError: the package mlflow is missing.
    """

    uri: str | None = None
    project: str = "hoptim"
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] | None = None
    id: str | None = None
    histograms: bool = True

    def __post_init__(self) -> None:
        require("mlflow", "mlflow")
        object.__setattr__(self, "tags", tuple(self.tags or ()) or None)

    @property
    def run_id(self) -> str | None:
        """The id of the open run; ``None`` if it has failed."""
        session = self.start()
        return session.run_id if session else None

    def start(self, config: Mapping[str, Any] | None = None) -> _Session | None:
        """The open run, or a new one with ``config``; ``None`` if it has failed."""
        if self not in _open:
            _open[self] = None
            with warn_of_failures("MLflow"):
                session = self._session()
                _log_parameters(session, config or {})
                _open[self] = session
        return _open[self]

    def log(self, row: Mapping[str, Any], hyperparameters: Tree | None = None) -> None:
        """Log a row's figures, and quantiles."""
        session = self.start()
        if session is None or row["inner_step"] <= session.last:
            return
        values = {name: float(value) for name, value in figures(row).items() if not isinstance(value, str)}
        for name, value in (hyperparameters or {}).items() if self.histograms else ():
            values |= quantiles(name, value)
        _open[self] = None
        with warn_of_failures("MLflow"):
            _log_metrics(session, values | steps(row), row["inner_step"])
            _open[self] = session

    def finish(
        self,
        summary: Mapping[str, Any] | None = None,
        images: Mapping[str, Path] | None = None,
        artifacts: Mapping[str, Sequence[Path]] | None = None,
    ) -> None:
        """Log pictures and artifacts, the summary as ``summary.json``, and close the run."""
        session = self.start()
        _open.pop(self, None)
        if session is None:
            return
        with warn_of_failures("MLflow"):
            for path in (images or {}).values():
                session.client.log_artifact(session.run_id, str(path), "pictures")
            for kind, paths in (artifacts or {}).items():
                for path in paths:
                    session.client.log_artifact(session.run_id, str(path), kind)
            if summary:
                session.client.log_dict(session.run_id, dict(summary), "summary.json")
            session.client.set_terminated(session.run_id, "FINISHED")

    def abandon(self) -> None:
        """Close the run as failed, if it is open."""
        session = _open.pop(self, None)
        if session is not None:
            with warn_of_failures("MLflow"):
                session.client.set_terminated(session.run_id, "FAILED")

    def _session(self) -> _Session:
        """A session with the run to continue, the run that the user has started, or a new run."""
        import mlflow
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        client = mlflow.MlflowClient(self.uri)
        if self.id is not None:
            client.update_run(self.id, status="RUNNING")
            return _Session(client=client, run_id=self.id, last=_last_step(client, self.id))
        if (own := mlflow.active_run()) is not None:
            client, run_id = mlflow.MlflowClient(), own.info.run_id
            return _Session(client=client, run_id=run_id, last=_last_step(client, run_id))
        tags = dict(tag.partition("=")[::2] for tag in self.tags or ())
        tags = {_name(key): value or "true" for key, value in tags.items()}
        tags |= {key: value for key, value in (("group", self.group), ("job_type", self.job_type)) if value}
        if self.name is not None:
            tags[MLFLOW_RUN_NAME] = self.name
        return _Session(client=client, run_id=client.create_run(_experiment(client, self.project), tags=tags).info.run_id)


def _experiment(client: Any, name: str) -> str:
    """The id of the experiment with this name, which another process may create at the same time."""
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        if (found := client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    raise ValueError(f"project={name!r} is an experiment of MLflow's that was deleted: restore it, or give another name")


def _last_step(client: Any, run_id: str) -> int:
    """The inner step of the run's last row."""
    history = client.get_metric_history(run_id, "inner_step")
    return max((metric.step for metric in history), default=-1)


def _log_parameters(session: _Session, config: Mapping[str, Any]) -> None:
    """Log the config with dotted names. Parameters of a continued run stay, since MLflow does not let them change."""
    from mlflow.entities import Param

    known = session.client.get_run(session.run_id).data.params
    found = [Param(_name(key), str(value)[:LENGTH]) for key, value in flat(config).items() if _name(key) not in known]
    for part in _parts(found, PARAMETERS):
        session.client.log_batch(session.run_id, params=part)


def _log_metrics(session: _Session, values: Mapping[str, float], step: int) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    found = [Metric(_name(key), value, now, step) for key, value in values.items()]
    for part in _parts(found, METRICS):  # inner_step comes last, so a row that has it is whole
        session.client.log_batch(session.run_id, metrics=part)


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _name(key: str) -> str:
    """The key as a name that MLflow allows: letters, digits and ``_-./ ``."""
    return re.sub(r"[^\w\-./ ]", "_", key)[:250]
