"""Two processes whose model is sharded, by FSDP2 or tensor parallel: each recipe trains to the values of one process."""

from __future__ import annotations

from typing import Any

import pytest
import sharded_recipes_job as job
import torch
from cases import same
from jobs import run_ranks
from torch.testing import assert_close

EXACT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in each case."""
    folder = tmp_path_factory.mktemp("sharded_recipes")
    run_ranks(2, job.__file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def expected(name: str, layout: str) -> dict[str, Any]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return job.one_process(name, layout, 2)
    finally:
        torch.set_default_dtype(before)


def assert_trained(found: list[dict[str, Any]], answer: dict[str, Any]) -> None:
    """The same on all ranks, to the bit, and that of one process, whose loss is the mean of theirs."""
    losses = torch.stack([one.pop("losses") for one in found]).mean(0)
    assert same(found[0], found[1])
    for name, value in {**answer, "vanished": None}.items():
        if value is not None:
            assert_close(losses if name == "losses" else found[0][name], value, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    assert found[0]["vanished"] == answer["vanished"]


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout, (_, names) in job.LAYOUTS.items() for name in names]
)
def test_a_recipe_trains_a_sharded_model_as_one_process(ranks: list[dict[str, Any]], layout: str, name: str) -> None:
    answer = expected(name, layout)
    assert_trained([one["trainings"][layout][name] for one in ranks], answer)
    assert any(gradient.abs().max() > 1e-5 for gradient in answer["hypergradients"].values())


@pytest.mark.parametrize("name", job.MADE_AFTER)
def test_a_recipe_may_be_made_after_the_model_is_sharded(ranks: list[dict[str, Any]], name: str) -> None:
    assert_trained([one["made_after"][name] for one in ranks], expected(name, "nested"))


def test_a_penalty_that_takes_shards_for_whole_weights_is_told_what_to_do(ranks: list[dict[str, Any]]) -> None:
    for told in (one["mistakes"] for one in ranks):
        kind, words, *notes = told["shapes"]
        assert (kind, "mixed torch.Tensor and DTensor" in words) == ("RuntimeError", True)
        assert notes[0].startswith("hoptim: train_loss was called with a batch that is a tuple")
        assert "add full_tensor() to a scalar that is made of them" in notes[1]
        kind, words, *notes = told["scalar"]
        assert (kind, len(notes)) == ("TypeError", 1)
        assert words.startswith(
            "train_loss returned a DTensor of which each rank has a part, (Partial(sum),): in a training"
        )
        assert "add full_tensor()" in words
        assert "add full_tensor()" in told["flat"][-1]
        kind, words, *notes = told["always"]
        assert (kind, "full_tensor" in words) == ("AttributeError", True)
        assert "if it has that method, since a hyperstep has plain weights" in notes[1]


def test_hyperparameters_are_whole_on_each_rank(ranks: list[dict[str, Any]]) -> None:
    for told in (one["mistakes"]["hyperparameter"] for one in ranks):
        assert told[0].startswith("hyperparameter 'unit' is sharded, (Shard(dim=0),): each rank has whole hyperparameters")
