"""Start hoptim's own scripts as a user would: another process, the checkout as its folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def train(*overrides, check=True, **environment):
    """Run scripts/train.py; return the finished process."""
    process = subprocess.run(command(*overrides), cwd=ROOT, env=env(**environment), capture_output=True, text=True)
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def command(*overrides):
    return [sys.executable, "scripts/train.py", *map(str, overrides)]


def env(**changes):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**clean, **changes}


def result(folder):
    return json.loads((Path(folder) / "result.json").read_text())


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def timeless(row):
    """What is the same in each run of the same bits."""
    return {key: value for key, value in row.items() if "seconds" not in key}
