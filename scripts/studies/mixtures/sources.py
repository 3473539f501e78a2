"""Ten sources of text, of which some are useful, some alike and some useless; and two targets, none of the sources."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FEW = 60_000  # bytes of a source that is small and useful
LETTERS = b"abcdefghijklmnopqrstuvwxyz "
Texts = dict[str, Tensor]


@cache
def texts(root: Path, seed: int) -> tuple[Texts, dict[str, tuple[Tensor, Tensor]]]:
    """The sources by name, and for each target its validation and its test text; as bytes, which are whole numbers.

    ``root`` has text/train.txt, valid.txt and test.txt, addresses on the State of the Union of 1790–1960, 1961–1992 and
    1993–2021, one a line, and moby_dick.txt. The rest comes from the running Python and its PyTorch.
    """
    draw, folder = random.Random(seed), root / "text"
    addresses = (folder / "train.txt").read_bytes().splitlines(keepends=True)
    early, middle, late = (b"".join(addresses[begin:end]) for begin, end in ((0, 61), (61, 121), (121, None)))
    few = b"".join(late[i : i + 2000] for i in sorted(draw.sample(range(0, len(late) - 2000, 2000), FEW // 2000)))
    python, torch_folder = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent
    own = [*(torch_folder / "distributions").glob("*.py"), *(torch_folder / "optim").glob("*.py")]
    unseen = sorted((torch_folder / "nn").rglob("*.py"))
    random.Random(1).shuffle(unseen)  # the same files for each seed
    shuffled = bytearray(middle[:500_000])
    draw.shuffle(shuffled)
    sources = {
        "addresses 1790–1850": early,
        "addresses 1851–1910": middle,
        "addresses 1911–1960, few": few,
        "copies of 6 kB of these": copies(few[:6000], draw),
        "Moby-Dick": (folder / "moby_dick.txt").read_bytes(),
        "Python library": some(python.glob("*.py"), 2_000_000, draw),
        "PyTorch, few": some(own, FEW, draw),
        "C++ headers": some((torch_folder / "include" / "ATen" / "native").rglob("*.h"), 1_500_000, draw),
        "manual of Python": (python / "pydoc_data" / "topics.py").read_bytes(),
        "shuffled letters": bytes(shuffled),
    }
    targets = {
        "addresses": ((folder / "valid.txt").read_bytes(), (folder / "test.txt").read_bytes()),
        "code": (joined(unseen[::2])[:400_000], joined(unseen[1::2])[:400_000]),
    }
    found = {name: (as_tensor(val), as_tensor(test)) for name, (val, test) in targets.items()}
    return {name: as_tensor(text) for name, text in sources.items()}, found


def copies(text: bytes, draw: random.Random, count: int = 300, length: int = 1000, changes: int = 20) -> bytes:
    """So many copies of pieces of a text, each with some bytes changed."""
    pieces = [text[begin : begin + length] for begin in range(0, len(text), length)]
    found = bytearray()
    for _ in range(count):
        copy = bytearray(draw.choice(pieces))
        for _ in range(changes):
            copy[draw.randrange(len(copy))] = draw.choice(LETTERS)
        found += copy
    return bytes(found)


def some(paths: Iterable[Path], size: int, draw: random.Random) -> bytes:
    """So many bytes of files in a random order."""
    chosen = sorted(paths)
    draw.shuffle(chosen)
    return joined(chosen)[:size]


def joined(paths: Iterable[Path]) -> bytes:
    return b"".join(path.read_bytes() for path in paths)


def as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
