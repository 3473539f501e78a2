"""Sharded trainings under Accelerate, Lightning and in torchtitan's loop, and 8-bit states: the values of one process."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import sharded_frameworks_job as job
import torch
from cases import same
from jobs import ROOT, run_ranks
from torch.testing import assert_close

import hoptim

World = list[dict[str, Any]]  # what each rank found
LEARNED = ("leaves", "hypergradients", "weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frameworks")


def ranks(folder: Path, size: int, *names: str) -> World:
    run_ranks(size, job.__file__, folder, *names)
    return [torch.load(folder / f"{'-'.join(names)} {rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def two(folder: Path) -> World:
    return ranks(folder, 2, "titan", "titan_tokens", "eight_bits")


@pytest.fixture(scope="module")
def accelerate(folder: Path) -> World:
    pytest.importorskip("accelerate", reason="needs the extra frameworks: pip install '.[frameworks]'")
    return ranks(folder, 2, "accelerate", "accelerate_checkpoints")


@pytest.fixture(scope="module")
def lightning(folder: Path) -> World:
    pytest.importorskip("lightning", reason="needs the extra frameworks: pip install '.[frameworks]'")
    return ranks(folder, 2, "lightning")


def check(found: list[dict[str, Any]], expected: dict[str, Any], names: bool = True) -> None:
    """Hyperparameters have the same bits on all ranks, and all that is learned has the values of one process."""
    assert all(same(one["leaves"], found[0]["leaves"]) for one in found)
    for one in found:
        assert one["is sharded"]
        assert one["steps"] == expected["steps"] == (job.STEPS, job.STEPS // job.EVERY)
        for part in LEARNED:
            here = one[part] if names else dict(zip(expected[part], one[part].values(), strict=True))
            assert_close(here, expected[part], rtol=1e-10, atol=1e-13)


@pytest.fixture
def plain() -> dict[str, Any]:
    found = job.plain()
    assert min(float(gradient.abs().max()) for gradient in found["hypergradients"].values()) > 1e-5
    return found


def test_torchtitans_loop_is_one_process_on_all_examples(two: World, plain: dict[str, Any]) -> None:
    check([one["titan"] for one in two], plain)
    for one in two:
        assert "'stem.weight' is on the meta device and has no values" in one["titan"]["meta"]


def test_one_process_with_shards_too(folder: Path, plain: dict[str, Any]) -> None:
    check([one["titan"] for one in ranks(folder, 1, "titan")], plain)


def test_torchtitans_sum_over_tokens_times_the_ranks_is_the_mean_over_all_tokens(two: World) -> None:
    found = [one["titan_tokens"] for one in two]
    check(found, job.titan_tokens())
    assert not torch.equal(found[0]["counts"], found[1]["counts"])


def test_lightning_is_one_process_on_all_examples(lightning: World, plain: dict[str, Any]) -> None:
    check([one["lightning"] for one in lightning], plain)


@pytest.mark.parametrize("case", [*(order.__name__ for order in job.ORDERS), "accumulated"])
def test_accelerate_is_one_process_on_all_examples_in_each_order(
    accelerate: World, plain: dict[str, Any], case: str
) -> None:
    check([one["accelerate"][case] for one in accelerate], plain)


@pytest.mark.parametrize("order", [order.__name__ for order in job.ORDERS[:2]])
def test_accelerate_computes_activations_again(accelerate: World, plain: dict[str, Any], order: str) -> None:
    found = [one["accelerate"]["activations again, " + order] for one in accelerate]
    assert "blocks.0._checkpoint_wrapped_module.up.weight" in found[0]["weights"]
    check(found, plain, names=False)


WORDS = {
    "as_returned": "TypeError: inner is an AcceleratedOptimizer, which hides its kind, and takes no step while gradients",
    "another_prepared": "ValueError: the inner optimizer holds no weight of the model that requires a gradient: build it on "
    "model.parameters() after the model was sharded, which replaces them",
    "inner_of_before": "ValueError: the inner optimizer holds no weight of the model that requires a gradient: build it on "
    "model.parameters() after the model was sharded, which replaces them",
    "inner_stepped": "UserWarning: the weights have moved between losses 1 and 2 without a step of the BilevelOptimizer",
}


@pytest.mark.parametrize("mistake", [mistake.__name__ for mistake in job.MISTAKES])
def test_wrong_orders_are_told_on_each_rank(accelerate: World, mistake: str) -> None:
    for one in accelerate:
        assert one["accelerate"][mistake].startswith(WORDS[mistake])


def test_checkpoints_under_accelerate(accelerate: World, plain: dict[str, Any]) -> None:
    found = [one["accelerate_checkpoints"] for one in accelerate]
    check([one["whole"] for one in found], plain)
    for one in found:
        assert same(one["resumed"], one["whole"])
        assert any("something has dropped the entry" in words for words in one["told"])


def test_eight_bit_states_are_one_process_on_all_examples(two: World) -> None:
    found = [one["eight_bits"] for one in two]
    check([one["end"] for one in found], job.plain(lambda model: job.RowScaled(model.parameters())))
    for one in found:
        assert set(one["kinds"]) == {"step int", "exp_avg_sq Tensor", "largest Tensor", "peak float"}
        assert {state.dtype for state in one["states"]} == {torch.uint8}
    assert not same(found[0]["states"][0], found[1]["states"][0])


def test_eight_bit_states_are_resumed_to_the_bit_on_each_rank(two: World) -> None:
    for one in two:
        found = one["eight_bits"]
        assert same(found["resumed"], found["end"])
        assert same(found["resumed from own"], found["end"])
        assert same(found["states resumed"], found["states"])
        assert found["peaks resumed"] == found["peaks"]
    assert all(peak != other for peak, other in zip(*(one["eight_bits"]["peaks"] for one in two), strict=True))


def test_eight_bit_states_of_two_ranks_are_refused_by_one(two: World, folder: Path) -> None:
    both = job.eight_bit_of(job.net())
    before = both[0].state_dict()
    with pytest.raises(
        ValueError, match=r"the state of RowScaled has \['exp_avg_sq', 'largest', 'peak'\] as plain tensors"
    ) as told:
        hoptim.load_checkpoint(folder / "eight bits", *both)
    assert "the checkpoint is of 2 ranks, and this training has 1" in str(told.value)
    assert same(both[0].state_dict(), before)


def test_eight_bit_moments_precondition_nothing(two: World) -> None:
    for one in two:
        assert "as torch.uint8, which are codes and no values: take Jacobi()" in one["eight_bits"]["second moments"]


def test_the_example_runs_goes_on_and_has_the_values_of_one_process(tmp_path: Path) -> None:
    example, printed = tmp_path / "shorter.py", []
    text = (ROOT / "scripts" / "examples" / "sharded.py").read_text()
    for long, short in (("range(600)", "range(120)"), ("== 300", "== 60"), ("warmup=150", "warmup=30")):
        assert long in text
        text = text.replace(long, short)
    example.write_text(text)
    for folder, size in ((tmp_path / "two", 2), (tmp_path / "two", 2), (tmp_path / "one", 1)):
        line = next(line for line in run_ranks(size, example, folder).splitlines() if line.startswith("{"))
        printed.append({name: float(value) for name, value in ast.literal_eval(line).items()})
        assert (folder / "step300" / ".metadata").exists()
    assert printed[0] == printed[1] == pytest.approx(printed[2], rel=0.01)
    assert all(abs(math.log(value / 1e-4)) > 0.1 for value in printed[0].values())  # away from where they started
