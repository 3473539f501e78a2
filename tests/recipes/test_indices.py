"""Numbers of examples in any whole type, of which torch takes uint8 and bool for masks; and starts that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hoptim.recipes import DomainWeights, ExampleWeights, SoftLabels

WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
LOSSES, LOGITS = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1)
NUMBERS = [0, 1, 1]  # as a mask they would mean the second and the third example


def domains() -> DomainWeights:
    hparams = DomainWeights({"a": 1, "b": 1})
    hparams["mixture"] = torch.tensor([0.3, 0.7])
    return hparams


def weights() -> ExampleWeights:
    hparams = ExampleWeights(3)
    hparams["example_weight"] = torch.tensor([0.1, 0.2, 0.9])
    return hparams


def labels() -> SoftLabels:
    return SoftLabels(torch.tensor([0, 1, 2]), start=0.8)


MEANS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], float]] = {
    "source": (domains, lambda h, i: h.mean(LOSSES, i), (0.6 * 1 + 1.4 * 2 + 1.4 * 4) / 3),
    "index of weights": (weights, lambda h, i: h.mean(LOSSES, i), (0.2 * 1 + 0.4 * 2 + 0.4 * 4) / 3),
    "index of labels": (
        labels,
        lambda h, i: h.cross_entropy(LOGITS, i),
        -float(LOGITS[0].log_softmax(0) @ torch.tensor([0.8 + 0.2, 0.1 + 1.6, 0.1 + 0.2])) / 3,
    ),
}


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("name", MEANS)
def test_whole_numbers_of_any_type_are_numbers(name: str, dtype: torch.dtype) -> None:
    make, mean, expected = MEANS[name]
    assert mean(make(), torch.tensor(NUMBERS, dtype=dtype)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MEANS)
def test_a_mask_a_fraction_and_a_list_are_refused(name: str) -> None:
    make, mean, _ = MEANS[name]
    for wrong, words in ((torch.tensor(NUMBERS).bool(), "of torch.bool"), (torch.ones(3), "of torch"), (NUMBERS, "a list")):
        with pytest.raises(TypeError, match=f"^{name.split()[0]} is {words}"):
            mean(make(), wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MEANS)
def test_numbers_out_of_range_are_errors_also_below_zero(name: str) -> None:
    """Where torch would count from the end."""
    make, mean, _ = MEANS[name]
    for wrong in (3, -1):
        with pytest.raises(IndexError, match="out of bounds"):
            mean(make(), torch.tensor([0, 1, wrong]))


@pytest.mark.parametrize("sizes", [(1, 1), (900, 100), (7, 3, 11, 2), (1e6, 3.0), (2.0, 1e5, 1.0)])
def test_a_mixture_starts_at_the_plain_mean_to_the_bit(sizes: tuple[float, ...]) -> None:
    hparams, losses = DomainWeights({str(i): size for i, size in enumerate(sizes)}), torch.rand(50, requires_grad=True)
    source = torch.arange(50) % len(sizes)
    found, expected = hparams.mean(losses, source), losses.mean()
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(one, losses)[0] for one in (found, expected)))
    assert F.cosine_similarity(hparams["mixture"], torch.tensor(sizes), dim=0).item() == pytest.approx(1.0)
