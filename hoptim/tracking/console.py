"""One line on the terminal for each hyperstep."""

from __future__ import annotations

from dataclasses import dataclass

from hoptim.problem.distributed import is_first
from hoptim.training.record import Record


@dataclass(frozen=True, kw_only=True)
class Console:
    """One line on the terminal for each hyperstep: loss, residual and status; a failed one in red, with what to do."""

    def __call__(self, record: Record) -> None:
        """Print the record's line."""
        if not is_first():
            return
        from rich.console import Console as RichConsole
        from rich.markup import escape

        row = record.row()
        val_loss = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        residual = "" if row["residual"] is None else f"residual {row['residual']:.2g}  "
        advice = "" if record.moved else f": {record.status.message} ({row['detail']})"
        line = f"step {row['inner_step']}  val {val_loss}  {residual}{row['products']} products  {row['status']}{advice}"
        colour = {"ok": "green", "remark": "yellow", "failed": "red"}[record.status.kind]
        RichConsole().print(f"[{colour}]{escape(line)}[/]", highlight=False)
