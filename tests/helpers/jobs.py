"""Start hoptim's own scripts as a user would: another process, the checkout as its folder."""

import atexit
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Its processes are forked from one that has imported this already, which takes longer than most runs in the tests.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hoptim", "hydra", "matplotlib.pyplot", "sklearn.datasets", "torch._dynamo"])


def train(*overrides, check=True, **environment):
    """Run scripts/train.py; return the finished process."""
    return run("train.py", *overrides, check=check, **environment)


def run(script, *arguments, check=True, **environment):
    """Run one of the scripts; return the finished process."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        words = [script, *map(str, arguments)]
        process = FORKS.Process(target=_run, args=(words, env(**environment), files))
        process.start()
        process.join()
        finished = subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in files))
    assert not check or finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def _run(words, environment, files):
    for descriptor, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [f"scripts/{words[0]}", *words[1:]]
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out


def command(*overrides):
    """The words with which a user starts scripts/train.py, for a test that kills it."""
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
