"""A line for each hyperstep, on the terminal or in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hoptim.problem.distributed import is_first
from hoptim.tracking.board import never_raises
from hoptim.training.record import Record, in_words, loss_in_words


@dataclass(frozen=True, kw_only=True)
class Console:
    """A line for each hyperstep, with loss, residual, status and hyperparameters; a failed one in red, with what to do."""

    @never_raises
    def __call__(self, record: Record) -> None:
        """Print the record's line."""
        if not is_first():
            return
        from rich.console import Console as RichConsole
        from rich.markup import escape

        row = record.row()
        residual = "" if row["residual"] is None else f"residual {row['residual']:.2g}  "
        solve = f"{residual}{row['products']} products  {row['status']}"
        end = in_words(record.hyperparameters) if record.moved else f"{record.status.message} ({row['detail']})"
        colour = {"ok": "green", "remark": "yellow", "failed": "red"}[record.status.kind]
        line = escape(f"step {row['inner_step']}  val {loss_in_words(row['val_loss'])}  {solve}: {end}")
        RichConsole().print(f"[{colour}]{line}[/]", highlight=False, soft_wrap=True)


@dataclass(kw_only=True, eq=False)
class JsonLines:
    r"""A line of JSON for each hyperstep in a file: ``Record.row()``, with the values of the hyperparameters.

    A new run begins a new file; that of the run before is kept beside it as ``….before``. A resumed run goes on in its file,
    without the rows after the checkpoint, which it writes again.

    Args:
        path: the file; its folder is made if necessary.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> JsonLines(path=path).log({"hyper_step": 1, "val_loss": 0.5})
    >>> path.read_text()
    '{"hyper_step": 1, "val_loss": 0.5}\n'
    """

    path: str | os.PathLike[str]
    _has_begun: bool = field(default=False, init=False, repr=False)

    @never_raises
    def __call__(self, record: Record) -> None:
        """Add the record's row."""
        if not is_first():
            return
        path, first = Path(self.path), record.hyper_step
        if first == 1 and path.is_file():
            path.replace(f"{path}.before")
        elif path.is_file() and not self._has_begun:
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(line for line in lines if json.loads(line).get("hyper_step", 0) < first))
        self._has_begun = True
        self.log(record.row())

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
