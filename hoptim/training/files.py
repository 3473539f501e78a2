"""Checkpoint files: written completely or not at all, and read only if they are undamaged."""

from __future__ import annotations

import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def to_bytes(value: Any) -> bytes:
    """What ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def write_atomically(path: Path, data: bytes, remedy: str) -> None:
    """Replace the file as a whole: if that fails, the old one is still there.

    Args:
        path: the file.
        data: the new contents.
        remedy: what the user should do after an error, for its message.

    Raises:
        OSError: the disk is full or can't be written to.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()  # it may be what fills the disk
        raise OSError(error.errno, f"{error.strerror}: {remedy}", str(path)) from error


def read_whole(path: Path) -> Any:
    """Load tensors and plain values that ``torch.save`` wrote, on the CPU. Unlike ``torch.load`` this verifies checksums.

    Raises:
        Exception: of any kind, if the file is damaged or no such file.
    """
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
    return torch.load(path, weights_only=True, map_location="cpu")
