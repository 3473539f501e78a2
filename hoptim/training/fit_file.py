"""The checkpoint file of a fit: when it is due, what it holds, and what has to agree with it."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hoptim.problem.distributed import Ranks
from hoptim.training.files import read_whole, to_bytes, write_atomically

VERSION = 1
PHASES = ("folds", "last")


class FitFile:
    """The file that a fit is saved in.

    Args:
        path: the file; its folder has to exist.
        every_seconds: the time after which it is written again, at the next mark.
        settings: what a resumed fit has to share with the saved one, by name: plain values.
        ranks: the processes that train together. The first one writes for all, and each reads.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(
        self, path: str | os.PathLike[str], every_seconds: float, settings: Mapping[str, Any], ranks: Ranks
    ) -> None:
        self.path = Path(path)
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise ValueError(f"checkpoint={os.fspath(path)!r}: give a file in a folder that is there")
        self._every, self._ranks = every_seconds, ranks
        self._settings = {**settings, "processes": ranks.size, "version": VERSION}
        self._written = time.monotonic()

    def is_due(self) -> bool:
        """Whether enough time has passed since the last writing, by the clock of the first rank."""
        return bool(self._ranks.gathered(time.monotonic() - self._written >= self._every)[0])

    def write(self, state: Mapping[str, Any]) -> None:
        """Write the states of all ranks, atomically.

        Raises:
            OSError: the disk is full or can't be written to.
            UnpicklingError: the state holds other things than tensors and plain values.
        """
        packed = self._ranks.gathered_by_first(to_bytes(dict(state)))
        if packed is not None:
            # Read at once, so that a state that can't be read fails now, and not at the resume.
            states = [torch.load(io.BytesIO(one), weights_only=True, map_location="cpu") for one in packed]
            data = to_bytes({"settings": self._settings, "ranks": states})
            write_atomically(self.path, data, "make room; fit with the same checkpoint goes on from the last one")
        self._written = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """The saved state of this rank, or ``None`` if there is none yet.

        Raises:
            ValueError: the file is damaged, of another fit, or missing on some ranks.
        """
        there = self._ranks.gathered(self.path.exists())
        if not all(there):
            if any(there):
                raise ValueError(f"checkpoint {self.path} is there for some of the ranks: give a path that all of them see")
            return None
        try:
            saved = read_whole(self.path)
            settings, states = saved["settings"], saved["ranks"]
            if not all(state["phase"] in PHASES for state in states):
                raise KeyError("phase")
        except Exception as error:
            reason = str(error).partition(". ")[0]
            raise ValueError(
                f"checkpoint {self.path} is damaged or no fit's ({type(error).__name__}: {reason}): delete it to begin anew"
            ) from error
        if differing := [name for name, here in self._settings.items() if settings.get(name) != here]:
            words = "; ".join(_difference(name, settings.get(name), self._settings[name]) for name in differing)
            raise ValueError(f"checkpoint {self.path} is of another fit: {words}. Make it as it was, or delete the file")
        return dict(states[self._ranks.rank])


def _difference(name: str, there: Any, here: Any) -> str:
    if name == "folds":
        return "its folds are others, as another torch.manual_seed or a splitter without random_state gives them"
    return f"{name} is {there!s:.200} there, {here!s:.200} here"
