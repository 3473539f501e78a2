"""What several models may share: frozen weights, and buffers that no training writes into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hoptim.linalg import dicts
from hoptim.problem.sharding import local
from hoptim.training.training_optimizer import TrainingOptimizer


class SharedTensor(NamedTuple):
    """A tensor of a model that is also one of a model before it.

    Attributes:
        model: the number of the model.
        name: the tensor's name there.
        first: its name in the first model that has it.
        is_buffer: whether it is a buffer, and not a weight.
        trains: whether a training would change it: a weight that requires a gradient, or a buffer beside such a weight.
    """

    model: int
    name: str
    first: str
    is_buffer: bool
    trains: bool


def find_shared(models: Sequence[nn.Module]) -> list[SharedTensor]:
    """The tensors that models share, in the order of the models.

    >>> one, two = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    >>> one.running_mean = two.running_mean
    >>> [(found.name, found.trains) for found in find_shared([one, two])]
    [('running_mean', True)]
    >>> [(found.name, found.trains) for found in find_shared([one.requires_grad_(False), two.requires_grad_(False)])]
    [('running_mean', False)]
    """
    seen: dict[int, tuple[int, str, bool]] = {}
    found = []
    for number, model in enumerate(models):
        for name, tensor, is_buffer, trains in _tensors(model):
            own = local(tensor)
            place = own.untyped_storage().data_ptr() if own.layout == torch.strided else 0  # 0 also of an empty one
            first, first_name, first_trains = seen.setdefault(place or id(tensor), (number, name, trains))
            if first != number:
                found.append(SharedTensor(number, name, first_name, is_buffer, trains or first_trains))
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool, bool]]:
    for prefix, module in model.named_modules():
        weights = dict(module.named_parameters(prefix, recurse=False))
        yield from ((name, weight, False, weight.requires_grad) for name, weight in weights.items())
        trains = any(weight.requires_grad for weight in weights.values())
        yield from ((name, buffer, True, trains) for name, buffer in module.named_buffers(prefix, recurse=False))


class SharedTensors:
    """The frozen weights and the buffers that models share, and what the buffers hold.

    Args:
        models: the models.

    Raises:
        ValueError: they share a tensor that is trained.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models, self._found = models, find_shared(models)
        if trained := [one.first for one in self._found if one.trains]:
            raise ValueError(
                f"two models that make returned share the tensor {trained[0]!r}, so that each would be trained on what is "
                "held out from the other: make every layer anew inside make, or deepcopy it there"
            )
        self._held = {one: models[one.model].get_buffer(one.name).clone() for one in self._found if one.is_buffer}

    def watch(self, optimizer: TrainingOptimizer) -> None:
        """Check after the first step of this optimizer, so that a mistake does not cost a whole training."""
        optimizer.register_step_post_hook(lambda *_: self.check() if optimizer.inner_steps == 1 else None)

    def check(self) -> None:
        """Raise ``ValueError`` if a training has changed what models share, or may do so."""
        for one in self._found:
            model, held = self._models[one.model], self._held.get(one)
            if held is None and model.get_parameter(one.name).requires_grad:
                raise ValueError(
                    f"{one.name!r} was frozen, is shared by several models, and requires a gradient now, so that one model "
                    "would be trained on the data of another: make this layer anew inside make, or deepcopy it there"
                )
            if held is not None and not dicts.is_same(model.get_buffer(one.name), held):
                raise ValueError(
                    f"the training wrote into the buffer {one.name!r}, which several models share, so that one has seen the "
                    "data of another: call eval() on this module after model.train(), or deepcopy it inside make"
                )
