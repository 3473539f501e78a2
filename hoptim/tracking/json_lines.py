"""A file of JSON lines, one for each hyperstep."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hoptim.problem.distributed import is_first
from hoptim.training.record import Record


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    r"""A line of JSON for each hyperstep, appended to a file: the figures of ``Record.row()``.

    Args:
        path: the file; its folder is made if necessary.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> JsonLines(path=path).log({"hyper_step": 1, "val_loss": 0.5})
    >>> path.read_text()
    '{"hyper_step": 1, "val_loss": 0.5}\n'
    """

    path: str | os.PathLike[str]

    def __call__(self, record: Record) -> None:
        """Append the record's row. A disk that fails only makes a warning and does not stop the training."""
        try:
            if is_first():
                self.log(record.row())
        except OSError as error:
            warnings.warn(f"a row was not written: {error}; training goes on without it", stacklevel=2)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row, or raise OSError and leave the file as it was, so that it has only whole rows."""
        path, line = Path(self.path), json.dumps(dict(row)) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(line)
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise OSError(error.errno, error.strerror, str(path)) from error
