"""Results in files: records under column names in a JSON file, and JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def write_whole(path: Path, text: str) -> None:
    """Write the whole file or leave the old one, so that a killed run damages nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def write_records(path: Path, records: Sequence[Record], **facts: Any) -> None:
    """Write the records, one on each line so that diffs are readable, below the facts and the column names."""
    columns = list(records[0]) if records else []
    lines = ",\n".join("  " + json.dumps(list(one.values())) for one in records)
    head = json.dumps({**facts, "columns": columns}, indent=1)[:-2]
    write_whole(path, f'{head},\n "records": [\n{lines}\n ]\n}}\n')


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records that :func:`write_records` wrote; none if there is no such file."""
    if not path.is_file():
        return []
    saved = json.loads(path.read_text())
    return [dict(zip(saved["columns"], values, strict=True)) for values in saved["records"]]


def five_digits(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The records with their floats rounded to five digits.

    >>> five_digits([{"loss": 0.12345678, "seed": 3}])
    [{'loss': 0.12346, 'seed': 3}]
    """
    return [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in record.items()} for record in records]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines, without one that is still being written; none if there is no such file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
