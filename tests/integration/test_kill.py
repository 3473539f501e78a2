"""SIGKILL at random moments of a run: what is on the disk is whole, and a resumed run ends in the same bits."""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import fit_job
import pytest
import torch
from cases import same
from jobs import ROOT, command, env, result, rows, run, start, timeless, torchrun, wait_for
from wandb_file import read

from hoptim.training.files import read_whole

OPTIONS = ("outer_steps=30", "inner_steps=10", "task.hidden=16", "checkpoint_every=2", "plots=false")
KILLS_A_RUN = 5


@contextmanager
def started(folder, processes):
    """The run in ``folder``, begun or gone on with, in one process or in several that find each other as under torchrun."""
    words = ("train.py", f"hydra.run.dir={folder}", *OPTIONS, "resume=true")
    output = {"files": [folder.with_suffix(".out")] * 2}
    if processes == 1:
        yield [start(*words, **output)]
    else:
        with torchrun(processes, *words, **output) as ranks:
            yield ranks


def said(folder):
    return folder.with_suffix(".out").read_text()


def finish(folder, processes):
    with started(folder, processes) as ranks:
        assert wait_for(ranks) == [0] * processes, said(folder)


def descendants(pid):
    """The process and all that it has begun, whatever session they are in."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found


def begun_at(folder):
    """When the job in the folder was last begun, after the imports."""
    path = folder / ".hydra" / "config.yaml"
    return path.stat().st_mtime_ns if path.exists() else 0


def duration(folder):
    """From then to its end, in seconds."""
    return ((folder / "result.json").stat().st_mtime_ns - begun_at(folder)) / 1e9


def killed(folder, draw, seconds, processes):
    """Start, and kill at a random moment of the next ``seconds`` of the job; false where it had ended before.

    Sometimes all processes die, as when the machine is switched off, and sometimes only one, as when its memory is full.
    """
    before = begun_at(folder)
    with started(folder, processes) as ranks:
        while begun_at(folder) == before:
            assert all(rank.exitcode is None for rank in ranks), said(folder)
            time.sleep(0.001)
        time.sleep(draw.uniform(0, seconds))
        everyone = [pid for rank in ranks for pid in descendants(rank.pid)]
        for pid in everyone if processes > 1 or draw.random() < 0.5 else everyone[:1]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for rank in ranks:
            rank.join()
    return ranks[0].exitcode == -signal.SIGKILL


def check_disk(folder, whole):
    """After a kill: the checkpoint is whole, and the rows are those of the whole run, the last of them perhaps in part."""
    lines = (folder / "metrics.jsonl").read_text().split("\n") if (folder / "metrics.jsonl").exists() else [""]
    found = [timeless(json.loads(line)) for line in lines[:-1]]
    assert found == whole[: len(found)]
    path = folder / "checkpoint.pt"
    at = read_whole(path)["outer_step"] if path.exists() else 0
    assert at <= len(found)
    return at


def check_end(folder, whole):
    """After the end: the same files as the run that was never killed."""
    assert result(folder) == result(whole)
    assert [timeless(row) for row in rows(folder)] == [timeless(row) for row in rows(whole)]
    values = [(where / "hyperparameters.safetensors").read_bytes() for where in (folder, whole)]
    assert values[0] == values[1]
    assert not list(folder.glob("*.part"))


def check_wandb(folder, whole, beginnings):
    """One run of W&B for each beginning; how many rows of figures no file of W&B's holds, since it was killed as well."""
    runs = [run for run in map(read, folder.glob("wandb/offline-run-*/*.wandb")) if run["id"]]
    assert len({run["id"] for run in runs}) <= beginnings
    history = {row["outer_step"]: row for run in runs for row in run["history"] if "outer_step" in row}
    for line in rows(whole):
        if (row := history.get(line["outer_step"])) is not None:
            assert row["metrics/test_loss"] == line["test_loss"]
    return len(rows(whole)) - len(history)


def moment(folder, at):
    if (folder / "result.json").exists():
        return "after the result"
    parts = [path.name for path in folder.glob("*.part")]
    return f"while writing {parts}" if parts else "after a checkpoint" if at else "before the first checkpoint"


def experiment(root, kills, seed, processes=1):
    """Kill so many times, up to five times a run; compare each run's end with the one that was never killed."""
    draw, counts = random.Random(seed), Counter()
    whole = root / "whole"
    finish(whole, processes)
    lines = [timeless(row) for row in rows(whole)]
    seconds = duration(whole)
    while counts["kills"] < kills:
        folder, at, beginnings = root / f"run{counts['runs']}", 0, 1
        for _ in range(min(KILLS_A_RUN, kills - counts["kills"])):
            if not killed(folder, draw, seconds, processes):
                seconds = duration(folder)  # it ended before, so the machine has become faster
                break
            counts["kills"] += 1
            before, at = at, check_disk(folder, lines)
            assert at >= before
            beginnings += not at
            counts[moment(folder, at)] += 1
            if (folder / "result.json").exists():
                break  # the next start would do nothing, so that its beginning would come after the end
        finish(folder, processes)
        check_end(folder, whole)
        counts["W&B rows lost"] += check_wandb(folder, whole, beginnings)
        counts["runs"] += 1
    return counts


@pytest.mark.parametrize(("kills", "processes"), [(3, 1), (1, 2)])
def test_a_run_that_is_killed_ends_in_the_same_bits(tmp_path, kills, processes):
    assert experiment(tmp_path, kills, seed=time.time_ns(), processes=processes)["kills"] == kills


def test_a_sharded_run_that_is_killed_ends_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "OPTIONS", (*OPTIONS, "sharded=true"))
    assert experiment(tmp_path, kills=1, seed=time.time_ns(), processes=2)["kills"] == 1


def test_processes_that_torchrun_has_started_do_the_same(tmp_path):
    options = command(f"hydra.run.dir={tmp_path / 'torchrun'}", *OPTIONS, "hoptim/tracker=[]")
    options[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(options, cwd=ROOT, env=env(), check=True)
    finish(tmp_path / "forked", 2)
    check_end(tmp_path / "torchrun", tmp_path / "forked")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_fifty_kills(tmp_path, processes):
    counts = experiment(tmp_path, kills=50, seed=0, processes=processes)
    print(dict(counts))
    assert counts["kills"] == 50


def test_a_cross_validated_fit_that_is_killed_in_each_phase_ends_in_the_same_bits(tmp_path):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    for each in (folder, whole):
        each.mkdir()
    for phase in ("folds", "last"):
        process = start(fit_job.__file__, folder)
        while True:
            assert process.exitcode is None, "it ended before it was killed"
            saved = read_whole(folder / "fit.pt")["ranks"][0] if (folder / "fit.pt").exists() else {"phase": None}
            if saved["phase"] == phase and (len(saved["history"]) >= 3 if phase == "folds" else saved["last"]["mark"]):
                break
            time.sleep(0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    for each in (folder, whole):
        run(fit_job.__file__, each)
    found, expected = (torch.load(each / "found.pt", weights_only=True) for each in (folder, whole))
    assert found["rows"] == expected["rows"]
    assert same(found, expected)
