"""Read what scripts/train.py has written into the folder of a run, which may still go on or may have failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.records import read_json_lines

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of one run.

    Attributes:
        folder: the folder that they are in.
        rows: the rows of ``metrics.jsonl``.
        result: the content of ``result.json``; ``{"status": "running"}`` if there is none yet.
        config: the text of ``config.yaml``.
        baselines: the rows of each plain training beside the run.
    """

    folder: Path
    rows: Rows
    result: Mapping[str, Any]
    config: str
    baselines: Mapping[str, Rows]


def is_run(folder: Path) -> bool:
    """Whether this is the folder of one run, not of a sweep."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "result.json"))


def read_run(folder: Path) -> RunFiles:
    """Read the folder of a run."""
    result, config = folder / "result.json", folder / "config.yaml"
    plain = sorted((folder / "baselines").glob("*/metrics.jsonl"))
    return RunFiles(
        folder=folder,
        rows=read_json_lines(folder / "metrics.jsonl"),
        result=json.loads(result.read_text()) if result.exists() else {"status": "running"},
        config=config.read_text() if config.exists() else "",
        baselines={path.parent.name: read_json_lines(path) for path in plain},
    )
