"""Runs the doctests of the scripts' modules, and prints how many examples there were."""

import doctest
import importlib
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
FOLDERS = ("common", "tasks")


def main() -> None:
    sys.path.insert(0, str(SCRIPTS))
    names = [f"{folder}.{path.stem}" for folder in FOLDERS for path in sorted((SCRIPTS / folder).glob("*.py"))]
    found = [doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS) for name in names]
    print(sum(one.attempted for one in found))
    sys.exit(bool(sum(one.failed for one in found)))


if __name__ == "__main__":
    main()
