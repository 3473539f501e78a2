"""Two and three processes under gloo: the hypergradient is that of one process on the joined batch, inside the solve."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ranks_job as job
import torch
from cases import same
from jobs import run_ranks
from tiny import VAL, joined, tiny
from torch import Tensor
from torch.testing import assert_close

import hoptim


@pytest.fixture(scope="module", params=[2, 3])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in each case."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    printed = run_ranks(request.param, job.__file__, folder)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]
    return [{**one, "rows": (folder / "rows.jsonl").read_text(), "printed": printed} for one in found]


def train_of(size: int, step: int = 0) -> Any:
    return joined([job.shard(rank, step) for rank in range(size)])


def val_of(size: int) -> Any:
    return joined([job.val_shard(rank) for rank in range(size)])


def equal_on_all_ranks(world: list[dict[str, Any]], case: str) -> dict[str, Any]:
    """The case's answer, the same to the last bit on each rank."""
    answers = [answers[case] for answers in world]
    assert all(same(answers[0], other) for other in answers[1:])
    return answers[0]


def assert_answer(found: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    for name, value in expected.items():
        if isinstance(value, (Tensor, dict)):
            assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert found[name] == value


def test_each_rank_has_the_scores_of_its_own_examples(world: list[dict[str, Any]]) -> None:
    size, problem = len(world), tiny(val=job.several)
    per_rank = [job.val_shard(rank) for rank in range(size)]
    val = joined([(x[part], y[part]) for part in (slice(0, 4), slice(4, 8)) for x, y in per_rank])  # two losses, as on each
    known = hoptim.influence(problem, job.of_examples, train_of(size), val)
    by_ekfac = hoptim.influence(problem, job.of_examples, train_of(size), val, job.by_ekfac(problem, job.shard(0))).scores
    for rank, found in enumerate(one["influenced"] for one in world):
        own = known.scores[:, rank * job.SIZE : (rank + 1) * job.SIZE]
        assert_close(found["scores"], own, rtol=1e-7, atol=1e-9)
        assert_close(found["x"], known.solution.value, rtol=1e-7, atol=1e-9)
        assert "self_influence solves for the examples of one process" in found["refused"]
        assert_close(found["by EKFAC"], by_ekfac[:, rank * job.SIZE : (rank + 1) * job.SIZE], rtol=1e-7, atol=1e-9)
        assert "the preconditioners EKFAC differ between the" in found["differing"]


@pytest.mark.parametrize("method", [method for method in job.METHODS if method != "compiled"])
def test_hypergradient_is_that_of_the_joined_batch(world: list[dict[str, Any]], method: str) -> None:
    found = equal_on_all_ranks(world, "methods")[method]
    expected = job.answer(tiny(), train_of(len(world)), val_of(len(world)), method)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if method == "differences" else {"rtol": 1e-9, "atol": 1e-12}
    assert_answer(found, expected, **tolerance)


@pytest.mark.parametrize("name", job.TASKS)
def test_tasks_are_split_over_ranks(world: list[dict[str, Any]], name: str) -> None:
    found = equal_on_all_ranks(world, "tasks")[name]
    assert_answer(found, job.task_answer(job.task_problem(), range(len(world)), name))


def test_ranks_may_have_different_numbers_of_tasks(world: list[dict[str, Any]]) -> None:
    problem = job.task_problem()
    train, val = (tuple(t[1:] for t in job.tasks_of(range(len(world)), pick)) for pick in (flipped_shard, flipped_val_shard))
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    found = hoptim.hypergradient(problem, train, val, hoptim.PerTask(2), inner=inner)
    expected = {"grads": found.grads, "val": found.val_loss, "train": found.train_loss}
    assert_answer(equal_on_all_ranks(world, "uneven_tasks"), expected)


def flipped_shard(number: int) -> Any:
    """The first two in the other order, so that the first rank's only task is not the first of all."""
    return job.shard(1 - number if number < 2 else number)


def flipped_val_shard(number: int) -> Any:
    return job.val_shard(1 - number if number < 2 else number)


def test_if_the_tasks_of_one_rank_fail_all_ranks_know(world: list[dict[str, Any]]) -> None:
    for found in (one["task_that_fails"] for one in world):
        assert not hoptim.Status[found["status"]].ok
        assert found["detail"].startswith("on rank 1: ")
        assert all(bool(g.isnan().all()) for g in found["grads"].values())


@pytest.mark.parametrize("world", [2], indirect=True)
def test_so_is_the_compiled_one(world: list[dict[str, Any]]) -> None:
    assert_answer(equal_on_all_ranks(world, "methods")["compiled"], job.answer(tiny(), train_of(2), val_of(2), "minres"))


@pytest.mark.parametrize("method", ["default", "unrolled"])
def test_mean_of_each_ranks_own_answer_would_be_another(method: str) -> None:
    own = [job.answer(tiny(), job.shard(rank), job.val_shard(rank), method)["grads"]["decay"] for rank in range(2)]
    right = job.answer(tiny(), train_of(2), val_of(2), method)["grads"]["decay"]
    assert float((torch.stack(own).mean(0) - right).abs().max()) > 1e-4


def test_vector_of_losses_goes_through_the_same_products(world: list[dict[str, Any]]) -> None:
    size = len(world)
    halves = [
        [tuple(part[rows] for part in job.val_shard(rank)) for rank in range(size)] for rows in (slice(4), slice(4, 8))
    ]
    val = joined([joined(half) for half in halves])
    assert_answer(equal_on_all_ranks(world, "vector"), job.answer(tiny(val=job.several), train_of(size), val))


def test_hyperparameters_may_be_wrapped_too(world: list[dict[str, Any]]) -> None:
    expected = job.answer(tiny(), train_of(len(world)), val_of(len(world)))
    assert_answer(equal_on_all_ranks(world, "wrapped_hyperparameters"), expected)


def test_uneven_batches_count_as_their_means_do(world: list[dict[str, Any]]) -> None:
    """As in DistributedDataParallel: the training loss is the mean of the ranks' means, whatever their sizes."""
    size = len(world)
    plain = tiny()

    def mean_of_means(model: Any, hparams: Any, batches: Any) -> Tensor:
        return torch.stack([plain.train_loss(model, hparams, one) for one in batches]).mean()

    uneven = hoptim.Problem(plain.model, plain.hparams, mean_of_means, plain.val_loss)
    shards = [job.shard(rank, size=job.SIZE - 2 * rank) for rank in range(size)]
    assert_answer(equal_on_all_ranks(world, "uneven"), job.answer(uneven, shards, val_of(size), "neumann"))


def test_averaged_curvature_is_that_of_all_batches_of_all_ranks(world: list[dict[str, Any]]) -> None:
    method = hoptim.Implicit(hoptim.CG(terms=9), curvature=hoptim.Averaged(batches=2), damping=0.5)
    size = len(world)
    expected = hoptim.hypergradient(tiny(), train_of(size), val_of(size), method, train_batches=[train_of(size, 1)])
    assert_answer(equal_on_all_ranks(world, "averaged"), {"grads": expected.grads})


def test_weights_and_hyperparameters_that_only_some_ranks_touch(world: list[dict[str, Any]]) -> None:
    """Way r, at weights w and decay λ: A = (2 XᵀX / n + 2 λ I) / R for each row, and so on, from the losses written out."""
    found, size = equal_on_all_ranks(world, "routed"), len(world)
    assert found["untouched"] == tuple(f"decay{way}" for way in range(size, 3))
    model = job.Routed().double()
    for rank in range(size):
        (x, _), (v, _), w, decay = job.shard(rank), job.val_shard(rank), model.ways[rank].weight.detach(), 0.5 + rank
        A = (x.T @ x / len(x) + 2 * decay * torch.eye(2)) / size  # the mean over n examples of 2 outputs
        g = (w @ v.T + 1) @ v / len(v) / size
        expected = -(2 * w / size * torch.linalg.solve(A, g.T).T).sum()
        assert_close(found["grads"][f"decay{rank}"], expected)


def test_nan_on_one_rank_is_the_same_status_on_all(world: list[dict[str, Any]]) -> None:
    found = equal_on_all_ranks(world, "nan_on_one")
    assert found == {"statuses": dict.fromkeys(("train", "val"), ("NON_FINITE_LOSS", False)), "still": True}


def check_training(world: list[dict[str, Any]], case: str, hypersteps: int) -> None:
    found, size = equal_on_all_ranks(world, case), len(world)
    optimizer = job.bilevel(tiny(), val_of(size), every=2, warmup=10)
    for step in range(9 + 2 * hypersteps):
        optimizer.zero_grad()
        optimizer.loss(train_of(size, step % 7)).backward()
        optimizer.step()
    assert found["hypersteps"] == hypersteps
    assert_answer(found, job.end(optimizer), rtol=1e-6, atol=1e-9)


def test_after_20_hypersteps_all_ranks_hold_the_same_bits_and_those_of_one_process(world: list[dict[str, Any]]) -> None:
    check_training(world, "training", 20)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_and_after_200(size: int, tmp_path: Path) -> None:
    run_ranks(size, job.__file__, tmp_path, "long_training")
    world = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    check_training(world, "long_training", 200)


def test_steps_that_were_taken_together_are_unrolled_together(world: list[dict[str, Any]]) -> None:
    found, size = equal_on_all_ranks(world, "unrolled"), len(world)
    optimizer = job.bilevel(tiny(), val_of(size), every=4, hypergradient=hoptim.Unrolled(steps=3))
    for step in range(12):
        optimizer.zero_grad()
        optimizer.loss(train_of(size, step)).backward()
        optimizer.step()
    assert found["status"] == "FINISHED"
    assert_answer(found, job.end(optimizer), rtol=1e-6, atol=1e-9)


def test_a_decay_in_the_step_is_that_of_one_process(world: list[dict[str, Any]]) -> None:
    found, size = equal_on_all_ranks(world, "decays_in_steps"), len(world)
    optimizer = job.bilevel(tiny(own=0.1), val_of(size), **job.OWN_DECAY)
    for step in range(12):
        optimizer.zero_grad()
        optimizer.loss(train_of(size, step)).backward()
        optimizer.step()
    assert_answer(found, job.end(optimizer))
    assert abs(found["tensors"]["own"].item() - 0.1) > 0.05


def test_accumulation_without_sync_sees_the_micro_batches_of_all_ranks(world: list[dict[str, Any]]) -> None:
    found, size = equal_on_all_ranks(world, "accumulated"), len(world)
    problem = tiny()
    optimizer = job.bilevel(problem, val_of(size), every=5)
    for step in range(20):
        optimizer.zero_grad()
        optimizer.loss(joined([train_of(size, 2 * step), train_of(size, 2 * step + 1)])).backward()
        optimizer.step()
    assert_answer(found, job.end(optimizer), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("composite", [False, True])
def test_outputs_beside_the_loss_change_no_bit(world: list[dict[str, Any]], composite: bool) -> None:
    found = equal_on_all_ranks(world, "outputs")
    assert found[f"{composite}, True"]["hypersteps"] == 2
    assert same(found[f"{composite}, True"], found[f"{composite}, False"])


def test_one_all_reduce_of_the_weights_size_a_product(world: list[dict[str, Any]]) -> None:
    """L_V, g and ∂L_V/∂λ; L_T and F; five products; the mixed product: eight, each with a flag for what may be missing."""
    weights, leaves, entries = 17, 3, 4
    found = equal_on_all_ranks(world, "communication")
    for losses, sizes in ((1, found["one"]), (2, found["two"])):
        validation, gradient = losses * (1 + weights + leaves) + (1 + entries + 2), weights + 1 + entries + 1
        assert sizes == [validation, gradient, *[losses * weights] * 5, losses * leaves + 2]


def test_the_first_rank_alone_logs(world: list[dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in world[0]["rows"].splitlines()]
    assert [row["hyper_step"] for row in rows] == [1, 2, 3]
    assert [answers["logging"]["hypersteps"] for answers in world] == [3] * len(world)
    assert len(re.findall(r"step \d+  val ", world[0]["printed"])) == 3


def test_synchronised_norms_have_torchs_own_error_on_a_cpu_and_are_right_in_evaluation(world: list[dict[str, Any]]) -> None:
    found, size = equal_on_all_ranks(world, "synchronised_norm"), len(world)
    assert "SyncBatchNorm" in found["message"]
    problem = job.normed()
    problem.model.eval()
    assert_answer(found, {"grads": hoptim.hypergradient(problem, train_of(size), val_of(size)).grads})


def test_hyperparameters_start_alike_and_weights_that_are_apart_are_an_error(world: list[dict[str, Any]]) -> None:
    found = [answers["start"] for answers in world]
    assert all(torch.equal(one["leaf"], torch.tensor(0.4)) for one in found)
    for one in found:
        assert "the weights differ between" in one["message"]
        assert "DistributedDataParallel" in one["message"]
        assert "process_group=None" in one["message"]
        assert one["first_loss"] == one["message"]
        assert any("in the dry run" in note for note in one["notes"])
        assert "audit is for one process" in one["audit"]


def test_a_problem_of_its_own_is_no_part_of_the_others(world: list[dict[str, Any]]) -> None:
    for rank, answers in enumerate(world):
        alone = tiny()
        with torch.no_grad():
            next(alone.model.parameters()).mul_(1 + rank)
        assert_close(answers["start"]["own"], hoptim.hypergradient(alone, job.shard(rank), VAL).grads)


def test_a_group_of_some_ranks(world: list[dict[str, Any]]) -> None:
    pair = job.answer(tiny(), train_of(2), val_of(2))
    for rank, answers in enumerate(world):
        single = job.answer(tiny(), job.shard(rank), job.val_shard(rank))
        assert_answer(answers["groups"], pair if rank < 2 else single)
        assert answers["groups"]["size"] == (2 if rank < 2 else 1)


def test_all_ranks_are_found(world: list[dict[str, Any]]) -> None:
    assert equal_on_all_ranks(world, "alone")["ranks"] == (len(world), 1)
