"""A cross-validated fit on two ranks is that of one process on the joined batches, and resumes to the bit on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fold_ranks_job as job
import pytest
import torch
from cases import same
from jobs import run_ranks
from torch.testing import assert_close


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in each case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, job.__file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("case", "options"), [("joined", {}), ("unequal", {"folds": job.UNEQUAL, "hypersteps": 3})])
def test_it_is_one_process_on_the_joined_batches(world, case, options):
    first, second = (answers[case] for answers in world)
    for part in ("learned", "models", "folds", "rows"):
        assert same(first[part], second[part])
    alone = job.fitted(0, 1, **options)
    assert same(first["folds"], alone["folds"])
    for part in ("learned", "models"):
        assert_close(first[part], alone[part], rtol=0, atol=1e-9)
    for found, expected in zip(first["rows"], alone["rows"], strict=True):
        assert found["status"] == expected["status"]
        assert found["standard_error"] == pytest.approx(expected["standard_error"], rel=1e-6)
    assert (first["learned"]["decay"] - torch.tensor([-2.0, -1.0])).abs().min() > 0.05


def test_it_is_resumed_to_the_bit_with_the_random_numbers_of_each_rank(world):
    for answers in world:
        assert answers["resumed"].pop("steps") < answers["whole"].pop("steps") - 20
        assert same(answers["resumed"], answers["whole"])
    first, second = (answers["whole"] for answers in world)
    assert same(first["models"], second["models"])
    assert not torch.equal(first["random"], second["random"])


def test_folds_that_differ_and_a_file_that_not_all_see_are_errors_on_all_ranks(world):
    for answers in world:
        assert "folds: the ranks have other ones" in answers["other folds"]
        assert "is there for some of the ranks" in answers["own file"]


def test_a_checkpoint_of_two_ranks_is_for_two(tmp_path):
    path = Path(tmp_path / "fit.pt")
    with pytest.raises(job.KilledError):
        job.fitted(0, 1, kill=15, checkpoint=path, every_seconds=0)
    saved = torch.load(path, weights_only=True)
    saved["settings"]["processes"] = 2
    torch.save(saved, path)
    with pytest.raises(ValueError, match="processes is 2 there, 1 here"):
        job.fitted(0, 1, checkpoint=path)
