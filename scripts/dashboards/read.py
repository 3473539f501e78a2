"""What scripts/train.py has written into the folder of a run, also of one that goes on or has failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of one run.

    Attributes:
        folder: where they are.
        rows: of ``metrics.jsonl``.
        result: of ``result.json``; ``{"status": "running"}`` where there is none yet.
        config: the text of ``config.yaml``.
        baselines: the rows of each plain training beside it.
    """

    folder: Path
    rows: Rows
    result: Mapping[str, Any]
    config: str
    baselines: Mapping[str, Rows]


def is_run(folder: Path) -> bool:
    """Whether the folder is that of one run, and not of a sweep."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "result.json"))


def read_run(folder: Path) -> RunFiles:
    """Read the folder of a run."""
    result, config = folder / "result.json", folder / "config.yaml"
    plain = sorted((folder / "baselines").glob("*/metrics.jsonl"))
    return RunFiles(
        folder=folder,
        rows=read_rows(folder / "metrics.jsonl"),
        result=json.loads(result.read_text()) if result.exists() else {"status": "running"},
        config=config.read_text() if config.exists() else "",
        baselines={path.parent.name: read_rows(path) for path in plain},
    )


def read_rows(path: Path) -> Rows:
    """The whole lines of a file of JSON lines; one that is being written is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
