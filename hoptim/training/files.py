"""Files that hold a checkpoint: written whole or not at all, and read only if they are whole."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, data: bytes, remedy: str) -> None:
    """Write the whole file or leave the old one: a failure in between does not damage it.

    Args:
        path: the file.
        data: all that it is to hold.
        remedy: what an error of the disk tells the user to do.

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
    """What ``torch.save`` wrote, on the CPU: tensors and plain values. Unlike ``torch.load`` it verifies checksums.

    Raises:
        Exception: of any kind, where the file is damaged or something else.
    """
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
    return torch.load(path, weights_only=True, map_location="cpu")
