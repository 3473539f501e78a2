"""Sharded weights on one process, in a group of its own; on several, integration/test_sharded.py."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import flat, noisy_problem, same
from memory import vectors_held, wide_problem
from torch import Tensor, distributed, nn

import hoptim
from hoptim.linalg import vectors
from hoptim.linalg.random import NormalNumbers, gaussian
from hoptim.linalg.vectors import Layout
from hoptim.problem import sharding
from hoptim.problem.distributed import Ranks
from hoptim.problem.sharding import Sharding, is_sharded


@pytest.fixture
def group() -> Iterator[Any]:
    """All processes, of which there is one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def problem_of(model: nn.Module, **options: Any) -> hoptim.Problem:
    def loss(m: Any, h: Any, b: Tensor) -> Tensor:
        return (m(b) - 1).square().mean() + h["decay"] * sum(p.square().sum() for p in m.parameters())

    return hoptim.Problem(model, nn.ParameterDict({"decay": torch.tensor(0.3)}), loss, loss, **options)


@pytest.mark.parametrize("pieces", [[10], [3, 7], [1, 0, 4, 5]])
def test_random_numbers_are_the_same_in_pieces(pieces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hoptim.linalg.random.AT_ONCE", 4)
    numbers = NormalNumbers(10, seed=3)
    found = torch.cat([numbers.take(count) for count in pieces])
    assert torch.equal(found, NormalNumbers(10, seed=3).take(10))
    assert float(found.std()) > 0.3
    assert torch.equal(found.view(2, 5), gaussian(5, 2, seed=3))
    assert not torch.equal(found, NormalNumbers(10, seed=4).take(10))


@pytest.mark.parametrize("process_group", ["auto", None])
def test_one_rank_alone(group: Any, process_group: Any) -> None:
    batches = torch.linspace(-1, 1, 12).reshape(4, 3), torch.linspace(-1, 2, 12).reshape(4, 3)
    model = fully_sharded(net())
    assert is_sharded(model)
    found = hoptim.hypergradient(problem_of(model, process_group=process_group), *batches)
    expected = hoptim.hypergradient(problem_of(net(), process_group=None), *batches)
    assert same(found.grads, expected.grads)
    assert {name: tuple(x.shape) for name, x in found.solution.value.items()} == {
        name: tuple(x.shape) for name, x in expected.solution.value.items()
    }


def test_vectors_of_shards_on_one_rank_are_those_of_whole_weights(group: Any) -> None:
    model = fully_sharded(net())
    live = dict(model.named_parameters())
    space = Sharding.of(model, live, Ranks(group)).vectors(Layout.of(live))
    u, v = (gaussian(space.whole.size, 2, seed=seed, dtype=torch.float64) for seed in (0, 1))
    assert space.shards.size == space.whole.size == len(flat({name: p.full_tensor() for name, p in live.items()}))
    assert torch.equal(space.gathered(u), u)
    assert torch.equal(space.mean(u), u)
    assert torch.equal(space.gaussian(2, seed=5), gaussian(space.whole.size, 2, seed=5, dtype=torch.float64))
    assert space.share is None
    assert torch.equal(space.gram(u, v), vectors.gram(u, v))
    assert torch.equal(space.norm(u[0]), vectors.norm(u[0]))
    assert torch.equal(space.largest(u[0]), u[0].max())


@pytest.mark.parametrize("curvature", [hoptim.Exact(), hoptim.GaussNewton()], ids=str)
def test_pieces_of_a_product_are_added_as_they_come(group: Any, curvature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solve holds g, its five vectors, the whole weights, and of two matrices one of the vector and one of the product."""
    monkeypatch.setattr(sharding, "LARGE", 1000)
    one = wide_problem(fully_sharded(wide_problem().model))
    assert vectors_held(one, hoptim.Implicit(curvature=curvature)) < 9.2  # a thread of gloo may hold a matrix or two longer
    found, expected = (hoptim.hypergradient(p, *torch.ones(2, 1, 64)) for p in (one, wide_problem()))
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-10, atol=0)


def test_models_without_shards_are_not_taken_for_sharded(group: Any) -> None:
    assert not is_sharded(net())
    assert not noisy_problem().is_sharded


class Elsewhere(nn.Parameter):
    """What stands for a weight whose shards are kept on the CPU, while its mesh is of GPUs."""

    device_mesh: Any = SimpleNamespace(device_type="cuda", size=lambda: 1, mesh=torch.zeros(1, dtype=torch.int))


def test_offloaded_shards_are_refused(group: Any) -> None:
    weight = Elsewhere(torch.ones(2))
    with pytest.raises(
        TypeError, match=r"weight 'w' are kept on cpu, and used on cuda: take fully_shard without an offload"
    ):
        Sharding.of(nn.Linear(1, 1), {"w": weight}, Ranks(group))


def test_ranks_that_leave_out_a_shard_are_refused(group: Any) -> None:
    weight = Elsewhere(torch.ones(2))
    weight.device_mesh = SimpleNamespace(device_type="cpu", size=lambda: 2, mesh=torch.arange(2))
    with pytest.raises(
        ValueError, match=r"'w' is sharded over the ranks \[0, 1\], and losses are averaged over \[0\]: leave"
    ):
        Sharding.of(nn.Linear(1, 1), {"w": weight}, Ranks(group))


def test_without_small_weights_no_rank_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("an empty tensor was sent, from a CPU, whatever device the weights are on")

    monkeypatch.setattr(distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(distributed, "all_reduce", refused)
    sharding = Sharding({}, Ranks(object()), is_one_batch=False)
    assert sharding.whole({}) == sharding.mean({}) == {}


def test_a_torch_with_wrong_hypergradients_of_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "RIGHT_FROM", "99.0")
    with pytest.raises(RuntimeError, match=r"Take torch 99\.0 or newer, or DistributedDataParallel"):
        Sharding.of(nn.Linear(1, 1), {}, SimpleNamespace())
