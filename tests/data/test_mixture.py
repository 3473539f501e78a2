from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import hoptim
from hoptim import Mixture
from hoptim.recipes import DomainWeights

SOURCES = {"a": [("a", n) for n in range(7)], "b": [("b", n) for n in range(4)], "c": [("c", n) for n in range(5)]}
P = {"a": 0.6, "b": 0.3, "c": 0.1}


class Endless(IterableDataset[int]):
    """0, 1, 2 … without a length, up to an end."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.end))


def first(stream: Iterable[Any], count: int) -> list[Any]:
    return list(islice(stream, count))


@pytest.mark.parametrize("length", [8, 32, 100])
def test_each_batch_has_the_share_of_each_source_within_two_examples(length: int) -> None:
    """Independent draws would differ by three standard deviations, which for half of 100 are 15."""
    drawn = torch.tensor([source for _, source, _ in first(Mixture(SOURCES, P), 40 * length)])
    counts = torch.stack([torch.bincount(part, minlength=3) for part in drawn.split(length)])
    assert (counts - length * torch.tensor([0.6, 0.3, 0.1])).abs().max() < 3


def test_over_seeds_the_first_example_is_of_each_source_as_often_as_its_probability() -> None:
    counts = Counter(first(Mixture(SOURCES, P, seed=seed), 1)[0][1] for seed in range(5000))
    assert [counts[n] / 5000 for n in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.021)  # three standard deviations


def test_each_pass_of_a_source_has_each_example_once_in_an_order_of_its_own() -> None:
    found = [example for example, source, _ in first(Mixture(SOURCES), 200) if source == 0]
    passes = [tuple(found[begin : begin + 7]) for begin in range(0, 56, 7)]
    assert all(sorted(one) == SOURCES["a"] for one in passes)
    assert len(set(passes)) > 6
    assert first(Mixture(SOURCES), 50) == first(Mixture(SOURCES), 50) != first(Mixture(SOURCES, seed=1), 50)


def test_the_share_is_the_probability_at_the_time_and_the_number_is_the_sources() -> None:
    mixture = Mixture(SOURCES, {"a": 3, "b": 1, "c": 0})
    stream = iter(mixture)
    for example, source, share in first(stream, 50):
        assert (example[0], share) == (("a", 0.75) if source == 0 else ("b", 0.25))
    mixture.update(torch.tensor([0.0, 0.0, 2.0]))
    assert {(source, share) for _, source, share in first(stream, 20)} == {(2, 1.0)}


def test_the_share_is_right_while_another_process_writes_the_probabilities() -> None:
    mixture = Mixture({"a": [1], "b": [2]})
    mixture.probabilities[0] = 0.75  # the first is written, the second not yet
    drawn = first(mixture, 500)
    assert {(source, share) for _, source, share in drawn} == {(0, 0.6), (1, 0.4)}
    assert sum(source for _, source, _ in drawn) == pytest.approx(200, abs=3)


def test_workers_share_an_indexed_source_and_see_an_update() -> None:
    mixture = Mixture({"a": list(range(40)), "b": list(range(100, 140))})
    loader = DataLoader(mixture, batch_size=4, num_workers=2, prefetch_factor=2)
    batches = iter(loader)
    found = first(batches, 12)
    seen = torch.cat([x for x, *_ in found]).tolist()
    assert len(set(seen)) == len(seen) == 48, "no example twice in the first pass"
    mixture.update({"a": 0.25, "b": 0.75})
    later = first(batches, 24)
    shares = {tuple(sorted({round(float(q), 6) for q in batch[2]})) for batch in later}
    assert (0.25, 0.75) in shares, "the workers draw by the new probabilities"
    for _, source, share in found + later:
        assert all(float(q) in (0.5, (0.25, 0.75)[d]) for d, q in zip(source.tolist(), share, strict=True))
    drawn = torch.cat([source for _, source, _ in later[8:]])
    assert drawn.double().mean().item() == pytest.approx(0.75, abs=0.07)


def test_ranks_share_an_indexed_source(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in range(3):
        for name, number in (("is_initialized", True), ("get_rank", rank), ("get_world_size", 3)):
            monkeypatch.setattr(f"torch.distributed.{name}", lambda number=number: number)
        found += [example for example, *_ in first(Mixture({"a": list(range(30))}), 10)]
    assert sorted(found) == list(range(30))


def test_a_stream_begins_again_at_its_end() -> None:
    found = [example for example, source, _ in first(Mixture({"a": Endless(3), "b": [9]}), 24) if source == 0]
    assert found[:10] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_hugging_face_datasets_are_sources_and_their_interleaving_takes_the_probabilities() -> None:
    datasets = pytest.importorskip("datasets", reason="the extra frameworks has datasets")
    sets = {name: datasets.Dataset.from_dict({"x": [number] * 100}) for number, name in enumerate("abc")}
    streams = {**sets, "c": sets["c"].to_iterable_dataset()}
    assert all(example == {"x": source} for example, source, _ in first(Mixture(streams, P), 30))
    loader = DataLoader(Mixture(streams, P), batch_size=10)
    (batch,) = first(loader, 1)
    assert torch.equal(batch[0]["x"], batch[1])

    hparams = DomainWeights(P)
    hparams["mixture"] = torch.tensor([0.2, 0.7, 0.1])
    probabilities = hparams.probabilities
    assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-15)
    joined = datasets.interleave_datasets(list(sets.values()), probabilities=list(probabilities.values()), seed=0)
    counts = Counter(joined["x"])
    assert counts[1] == 100, "it stops at the end of the first"
    assert counts[0] / len(joined) == pytest.approx(0.2, abs=0.1)
    torch.testing.assert_close(DomainWeights(probabilities)["mixture"], hparams["mixture"])


def test_a_loss_on_drawn_examples_has_the_derivative_of_the_mixture_of_means() -> None:
    """Σ_d p_d·(mean loss of d), whatever q the examples were drawn with; here each source has its share q of the batch."""
    hparams = DomainWeights(dict.fromkeys("abc", 1)).double()
    hparams["mixture"] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    source = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0, 1.0, 4.0, 7.0, 8.0], dtype=torch.float64)
    share = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)[source]
    means = torch.tensor([11 / 4, 5 / 2, 15 / 2], dtype=torch.float64)
    found, expected = hparams.mean(losses, source, share), hparams["mixture"] @ means
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    leaf = list(hparams.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(one, leaf)[0] for one in (found, expected)), rtol=1e-12, atol=0)


def test_an_outer_step_treats_all_sources_alike_in_whatever_order() -> None:
    def moved(names: str) -> dict[str, float]:
        hparams = DomainWeights(dict.fromkeys(names, 1))
        outer = hparams.optimizer()
        losses = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 9.0}
        for _ in range(5):
            outer.zero_grad()
            (hparams["mixture"] @ torch.tensor([losses[name] for name in names])).backward()
            outer.step()
        return hparams.probabilities

    assert moved("abcd") == pytest.approx(moved("dbca"), rel=1e-5)


def test_learned_weights_follow_a_training_and_find_the_source_that_fits() -> None:
    """Three sources with means −1, 0 and 2 and a target of 2: all weight goes to the last, and the training draws it."""
    torch.manual_seed(0)
    sources = {name: (torch.randn(50) / 10 + mean).tolist() for name, mean in (("a", -1.0), ("b", 0.0), ("c", 2.0))}
    model, hparams = torch.nn.ParameterDict({"w": torch.tensor(0.0)}), DomainWeights(dict.fromkeys(sources, 1))
    stream = Mixture(sources)
    problem = hoptim.Problem(
        model,
        hparams,
        lambda model, hparams, batch: hparams.mean((model["w"] - batch[0]).square(), *batch[1:]),
        lambda model, hparams, batch: (model["w"] - batch).square(),
    )
    optimizer = hoptim.BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        hparams.optimizer(),
        problem,
        val_batches=[torch.tensor(2.0)],
        train_batches=DataLoader(Mixture(sources), batch_size=30),
        every=5,
        warmup=20,
        hooks=[lambda record: stream.update(hparams["mixture"])],
    )
    for batch in first(DataLoader(stream, batch_size=20), 400):
        optimizer.zero_grad()
        optimizer.loss((batch[0].float(), *batch[1:])).backward()
        optimizer.step()
    assert hparams.probabilities["c"] > 0.95
    torch.testing.assert_close(stream.probabilities, hparams["mixture"].detach().double())
    assert model["w"].item() == pytest.approx(2.0, abs=0.2)


def test_a_resumed_training_goes_on_in_the_batches_of_its_hypersteps() -> None:
    sources = {"a": [0.0, 1.0, 2.0], "b": [5.0, 7.0, 8.0, 9.0]}

    def made() -> tuple[hoptim.BilevelOptimizer, DomainWeights]:
        model, hparams = torch.nn.ParameterDict({"w": torch.tensor(1.0)}), DomainWeights({"a": 1, "b": 1})

        def train_loss(model: Any, hparams: Any, batch: Any) -> torch.Tensor:
            return hparams.mean((model["w"] - batch[0]).square(), *batch[1:])

        problem = hoptim.Problem(model, hparams, train_loss, lambda model, hparams, batch: (model["w"] - batch).square())
        optimizer = hoptim.BilevelOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            hparams.optimizer(),
            problem,
            val_batches=[torch.tensor(3.0)],
            train_batches=DataLoader(Mixture(sources), batch_size=3),
            every=None,
        )
        return optimizer, hparams

    straight, expected = made()
    for _ in range(7):
        straight.hyperstep()
    first_part, moved = made()
    for _ in range(4):
        first_part.hyperstep()
    resumed, found = made()
    found.load_state_dict(moved.state_dict())
    resumed.load_state_dict(first_part.state_dict())
    for _ in range(3):
        resumed.hyperstep()
    assert torch.equal(found["mixture"], expected["mixture"])
    assert not torch.equal(found["mixture"], moved["mixture"])


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "no sources": (lambda: Mixture({}), ValueError, "sources is empty"),
    "no examples": (lambda: Mixture({"a": [1], "b": []}), ValueError, "source 'b' has no examples"),
    "a number": (lambda: Mixture({"a": 3}), TypeError, "source 'a' is an int"),  # type: ignore[dict-item]
    "a path": (lambda: Mixture({"a": "text.txt"}), TypeError, "source 'a' is a str"),
    "an unknown source": (lambda: Mixture({"a": [1]}, {"a": 1, "b": 1}), ValueError, r"differ in \['b'\]"),
    "a source without one": (lambda: Mixture(SOURCES, {"a": 1, "b": 1}), ValueError, r"differ in \['c'\]"),
    "NaN": (lambda: Mixture({"a": [1]}, {"a": float("nan")}), ValueError, "probabilities are {'a': nan}"),
    "below zero": (lambda: Mixture({"a": [1], "b": [1]}, {"a": 2, "b": -1}), ValueError, "'b': -1.0"),
    "all zero": (lambda: Mixture({"a": [1]}, {"a": 0}), ValueError, "not all 0"),
    "too many": (lambda: Mixture({"a": [1]}).update(torch.ones(2)), ValueError, r"shape \(2,\): there are 1 sources"),
    "an empty stream": (lambda: first(Mixture({"a": Endless(0)}), 1), ValueError, "source 'a' gave no examples"),
    "a stream that ends": (lambda: first(Mixture({"a": iter([1, 2])}), 3), ValueError, "cannot be iterated again"),
    "a share too few": (
        lambda: DomainWeights({"a": 1, "b": 1}).mean(torch.ones(2), torch.zeros(2).long(), torch.ones(1)),
        ValueError,
        r"losses have shape \(2,\) and share \(1,\)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_drawn_is_named(name: str) -> None:
    call, error, words = FAULTS[name]
    with pytest.raises(error, match=words):
        call()
