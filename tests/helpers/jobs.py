"""Start hoptim's own scripts as a user would: another process, the checkout as its folder."""

import atexit
import json
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]

# Its processes are forked from one that has imported this already, which takes longer than most runs in the tests.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["hoptim", "hydra", "matplotlib.pyplot", "sklearn.model_selection", "torch._dynamo", "wandb.sdk.launch"]
)


def train(*overrides, check=True, **options):
    """Run scripts/train.py; return the finished process."""
    return run("train.py", *overrides, check=check, **options)


def run(script, *arguments, check=True, **options):
    """Run one of the scripts; return the finished process."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = start(script, *arguments, files=files, **options)
        process.join()
        finished = subprocess.CompletedProcess([script, *arguments], process.exitcode, *(path.read_text() for path in files))
    assert not check or finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def start(script, *arguments, files=(os.devnull, os.devnull), largest=None, **environment):
    """Begin one of the scripts, or another file, in a session of its own; its output and errors are added to the files.

    No file that it writes can have more than ``largest`` bytes.
    """
    words = [str(Path("scripts", script)), *map(str, arguments)]
    process = FORKS.Process(target=_run, args=(words, env(**environment), files, largest))
    process.start()
    return process


@contextmanager
def torchrun(count, script, *arguments, **options):
    """Begin so many processes that find each other as those of torchrun do, by a store of this process.

    Those that have not ended when the block does are killed.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} for rank in range(count)]
    processes = [start(script, *arguments, **meeting, **rank, **options) for rank in ranks]
    try:
        yield processes
    finally:
        for process in processes:
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        del store  # which has to live until now


def wait_for(processes, seconds=400):
    """Wait until all have ended, or one with an error, for which the others may wait in vain; return their exit codes."""
    end = time.monotonic() + seconds
    while (alive := [one.sentinel for one in processes if one.exitcode is None]) and time.monotonic() < end:
        if any(one.exitcode for one in processes):
            break
        connection.wait(alive, timeout=1)
    return [one.exitcode for one in processes]


def run_ranks(count, script, *arguments):
    """Run so many processes of a script, and return what they printed."""
    with tempfile.NamedTemporaryFile("r") as output:
        with torchrun(count, script, *arguments, files=[output.name] * 2) as processes:
            codes = wait_for(processes)
        printed = output.read()
    assert codes == [0] * count, printed[-4000:]
    return printed


def _run(words, environment, files, largest):
    os.setsid()
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    for descriptor, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    sys.path.insert(0, str(Path(ROOT, words[0]).parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out


def command(*overrides):
    """The words with which a user starts scripts/train.py."""
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
