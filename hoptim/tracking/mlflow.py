"""A tracker that logs to MLflow."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from hoptim.tracking.board import Array, Board, Files, Images, flat


class _Session(NamedTuple):
    """A run that is being written: its client, its id, and its last inner step when it was opened."""

    client: Any
    id: str
    last: int


@dataclass(kw_only=True, eq=False)
class MLflow(Board):
    """MLflow: the figures of each hyperstep and the hyperparameters against inner steps; it has no histograms.

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
        histograms: of no effect here.

    Raises:
        ImportError: the package mlflow is missing.
    """

    package: ClassVar[str] = "mlflow"
    uri: str | None = None
    project: str = "hoptim"
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] | None = None
    id: str | None = None

    def _open(self, config: dict[str, Any]) -> _Session:
        import mlflow
        from mlflow.entities import Param

        own = mlflow.active_run() if self.id is None else None
        client = mlflow.MlflowClient(None if own else self.uri)
        run = own.info.run_id if own else self.id or self._new(client)
        client.update_run(run, status="RUNNING")
        known = client.get_run(run).data.params  # which MLflow does not let change
        found = [Param(_name(key), str(value)[:500]) for key, value in flat(config).items() if _name(key) not in known]
        for at in range(0, len(found), 100):  # MLflow takes no more at once
            client.log_batch(run, params=found[at : at + 100])
        rows = client.get_metric_history(run, "inner_step")
        return _Session(client=client, id=run, last=max((row.step for row in rows), default=-1))

    def _new(self, client: Any) -> str:
        """The id of a new run in the experiment."""
        from mlflow.exceptions import MlflowException

        if client.get_experiment_by_name(self.project) is None:
            with suppress(MlflowException):  # another process may have made it just now
                client.create_experiment(self.project)
        tags = {_name(key): value or "true" for key, _, value in (tag.partition("=") for tag in self.tags or ())}
        named = {"group": self.group, "job_type": self.job_type, "mlflow.runName": self.name}
        tags |= {key: value for key, value in named.items() if value}
        return str(client.create_run(client.get_experiment_by_name(self.project).experiment_id, tags=tags).info.run_id)

    def _log(self, run: _Session, row: Mapping[str, Any], large: Mapping[str, Array]) -> None:
        from mlflow.entities import Metric

        if (step := row["inner_step"]) <= run.last:
            return
        self._run, now = None, int(time.time() * 1000)  # after a failure nothing more is sent
        found = [Metric(_name(key), float(each), now, step) for key, each in row.items() if not isinstance(each, str)]
        for at in range(0, len(found), 1000):  # inner_step comes last, so a row that has it is whole
            run.client.log_batch(run.id, metrics=found[at : at + 1000])
        self._run = run

    def _end(self, run: _Session, summary: Mapping[str, Any], images: Images, artifacts: Files) -> None:
        for kind, paths in {"pictures": list(images.values()), **artifacts}.items():
            for path in paths:
                run.client.log_artifact(run.id, str(path), kind)
        run.client.log_dict(run.id, dict(summary), "summary.json")

    def _close(self, run: _Session, failed: bool) -> None:
        run.client.set_terminated(run.id, "FAILED" if failed else "FINISHED")


def _name(key: str) -> str:
    """The key as a name that MLflow allows: letters, digits and ``_-./ ``, and a path without empty parts.

    >>> _name("hyperparameters/lower//upper:1/")
    'hyperparameters/lower/upper_1'
    """
    return posixpath.normpath(re.sub(r"[^\w\-./ ]", "_", key)[:250])
