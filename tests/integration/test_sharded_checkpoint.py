"""Checkpoints of sharded models: resumed on as many ranks to the bit, on others with the same values, and after SIGKILL."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import sharded_checkpoint_job as job
import torch
from cases import same
from jobs import run_ranks, torchrun
from torch.distributed import checkpoint
from torch.testing import assert_close

import hoptim

World = list[dict[str, Any]]  # what each rank found
FIXED = [name for name, case in job.CASES.items() if not case.is_random]


def ranks(folder: Path, size: int, *words: str) -> World:
    run_ranks(size, job.__file__, folder, *words)
    found = [torch.load(folder / f"{words[0]} on {size} rank {rank}.pt", weights_only=True) for rank in range(size)]
    return [{key: value for word in words for key, value in [(word, one[word])]} for one in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder: Path) -> World:
    return ranks(folder, 2, "begin")


@pytest.fixture(scope="module")
def four(folder: Path) -> World:
    return ranks(folder, 4, "begin")


@pytest.fixture(scope="module")
def resumed_on_two(folder: Path, two: World, four: World) -> World:
    return ranks(folder, 2, "resume:2", "resume:4", "resume_from_own_files:2", "refused")


@pytest.fixture(scope="module")
def resumed_on_four(folder: Path, two: World, four: World) -> World:
    return ranks(folder, 4, "resume:2", "resume_in_two_axes:2", "resume_from_own_files:2")


@pytest.mark.parametrize("case", job.CASES)
def test_on_as_many_ranks_each_has_the_bits_of_the_run_without_a_break(two: World, resumed_on_two: World, case: str) -> None:
    for rank in range(2):
        assert same(resumed_on_two[rank]["resume:2"][case], two[rank]["begin"][case])


def test_the_cases_carry_what_they_are_there_for(two: World) -> None:
    kept = {name: set(two[0]["begin"][name]["only"]["solver_state"]) for name in job.CASES}
    assert kept["neumann"] == {"direction"}
    assert kept["warm"] == {"solution"}
    assert kept["two losses"] == {"direction", "solution"}
    assert two[0]["begin"]["two losses"]["only"]["solver_state"]["solution"].shape[0] == 2
    own = [answers["begin"]["random"] for answers in two]
    assert not torch.equal(own[0]["only"]["random"], own[1]["only"]["random"])
    assert not torch.equal(own[0]["own"]["1.running_mean"], own[1]["own"]["1.running_mean"])
    assert all(torch.equal(own[0]["alike"]["hparams"][name], leaf) for name, leaf in own[1]["alike"]["hparams"].items())


@pytest.mark.parametrize("case", job.ON_FOUR)
def test_on_another_number_of_ranks_the_values_are_those_of_the_run_without_a_break(
    two: World, four: World, resumed_on_two: World, resumed_on_four: World, case: str
) -> None:
    resumed = [(resumed_on_four, "resume:2"), (resumed_on_four, "resume_in_two_axes:2"), (resumed_on_two, "resume:4")]
    for found, word in ((four, "begin"), *resumed):
        for answers in found:
            for part in ("whole", "alike"):
                assert_close(answers[word][case][part], two[0]["begin"][case][part], rtol=1e-12, atol=1e-13)


def test_files_of_each_rank_alone_serve_the_same_rank_of_as_many(
    two: World, resumed_on_two: World, resumed_on_four: World
) -> None:
    for rank, answers in enumerate(resumed_on_two):
        found = answers["resume_from_own_files:2"]
        assert f"of shards of rank {1 - rank} of 2, and here it is of shards of rank {rank} of 2" in found["message"]
        assert same(found["end"]["own"], two[rank]["begin"]["neumann"]["own"])
        assert same(found["end"]["alike"], two[rank]["begin"]["neumann"]["alike"])
    for rank, answers in enumerate(resumed_on_four):
        found = answers["resume_from_own_files:2"]
        assert f"of rank {(rank + 1) % 2} of 2, and here it is of shards of rank {rank} of 4" in found["message"]
        assert "hoptim.load_checkpoint" in found["message"]
    for answers in (*resumed_on_two, *resumed_on_four):
        found = answers["resume_from_own_files:2"]
        assert same(found["before"], found["after"])


def test_what_does_not_fit_is_refused(resumed_on_two: World) -> None:
    for answers in resumed_on_two:
        found = answers["refused"]
        assert found["there already"].startswith("FileExistsError")
        assert "a folder of its own" in found["there already"]
        assert found["nothing there"].startswith("FileNotFoundError")
        assert "this state_dict is another model's: 1.weight (8,) there is 2.weight (3, 8) here" in found["other model"]
        assert "['CosineAnnealingLR'] where the checkpoint was taken, and [] now" in found["other objects"]
        assert found["sharded object"].startswith("TypeError")


@pytest.mark.parametrize("case", FIXED)
def test_one_process_with_whole_weights_goes_on_too(folder: Path, two: World, case: str) -> None:
    both = job.build(job.CASES[case], job.whole)
    with pytest.warns(UserWarning, match="the checkpoint is of 2 ranks, and this training has 1"):
        hoptim.load_checkpoint(folder / f"{case} 2", *both)
    job.train(*both)
    found = job.end(*both)
    for part in ("whole", "alike"):
        assert_close(found[part], two[0]["begin"][case][part], rtol=1e-12, atol=1e-13)


def test_the_model_alone_can_be_read_without_hoptim(folder: Path, two: World) -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    optimizer, _ = both = job.build(job.CASES["neumann"], job.whole)
    with pytest.warns(UserWarning, match="the checkpoint is of 2 ranks"):
        hoptim.load_checkpoint(folder / "neumann 2", *both)
    state = {"model": plain.state_dict()}
    with pytest.warns(UserWarning, match="in a single process"):  # of torch
        checkpoint.load(state, checkpoint_id=folder / "neumann 2", no_dist=True)
    assert same(state["model"], dict(optimizer.problem.model.state_dict()))


@pytest.mark.parametrize("case", FIXED)
def test_in_one_process_it_is_the_optimizers_own_state(tmp_path: Path, case: str) -> None:
    both, other, again, never_saved = (job.build(job.CASES[case], job.whole) for _ in range(4))
    job.train(*both, to=job.SAVED)
    hoptim.save_checkpoint(tmp_path / "saved", *both)
    hoptim.load_checkpoint(tmp_path / "saved", *other)
    assert same(other[0].state_dict(), both[0].state_dict())
    for part, saved in zip((again[0].problem.model, *again), (both[0].problem.model, *both), strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    for each in (both, other, again, never_saved):
        job.train(*each)
        assert same(job.end(*each), job.end(*both))


def test_before_the_first_step_nothing_is_invented(tmp_path: Path) -> None:
    both, other = (job.build(job.CASES["neumann"], job.whole) for _ in range(2))
    hoptim.save_checkpoint(tmp_path / "saved", *both)
    job.train(*other)
    hoptim.load_checkpoint(tmp_path / "saved", *other)
    assert not other[0].inner.state
    assert not other[0].outer.state
    assert same(other[0].state_dict(), both[0].state_dict())


def test_a_damaged_file_and_another_model_are_refused_as_a_whole(tmp_path: Path) -> None:
    both, other = (job.build(job.CASES["neumann"], job.whole) for _ in range(2))
    job.train(*both, to=job.SAVED)
    hoptim.save_checkpoint(tmp_path / "saved", *both)
    before = copy.deepcopy(job.end(*other))
    other[0].problem.model.register_buffer("more", torch.zeros(2))
    with pytest.raises(ValueError, match=r"\['more'\] differ in name or shape"):
        hoptim.load_checkpoint(tmp_path / "saved", *other)
    del other[0].problem.model.more
    (file,) = (tmp_path / "saved").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(RuntimeError, match="the checkpoint is damaged, so load an earlier one"):
        hoptim.load_checkpoint(tmp_path / "saved", *other)
    (tmp_path / "saved" / ".metadata").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="the checkpoint is damaged, so load an earlier one"):
        hoptim.load_checkpoint(tmp_path / "saved", *other)
    assert same(job.end(*other), before)


def test_a_training_that_is_killed_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, folder, draw = tmp_path / "whole", tmp_path / "killed", random.Random(time.time_ns())
    for each in (whole, folder):
        each.mkdir()
    with torchrun(2, job.__file__, folder, "again_and_again") as processes:
        while not (folder / "step6").exists():
            assert all(one.exitcode is None for one in processes)
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2))
        for one in processes:
            os.kill(one.pid, signal.SIGKILL)
        for one in processes:
            one.join()
    assert [one.exitcode for one in processes] == [-signal.SIGKILL] * 2
    found, expected = ([one["again_and_again"] for one in ranks(each, 2, "again_and_again")] for each in (folder, whole))
    assert [one.pop("begun") for one in expected] == [0, 0]
    assert all(6 <= one.pop("begun") < 24 for one in found)
    assert same(found, expected)
    assert not list(folder.glob(".*"))
