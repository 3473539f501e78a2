"""Hyperparameters without gradients, on the memory of those that have them: what the training loss of a step is given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hoptim.problem.loss_checks import ONLY_READS

_PLAIN = (bool, int, float, str, Tensor)
_TORCHS = frozenset(vars(nn.Module()))  # attributes that are torch's own


class DetachedView:
    """A persistent copy of ``module`` whose parameters are views of the same memory that require no gradient.

    Switching ``requires_grad`` of the module's own would break activation checkpointing, which runs a loss a second time.
    This is looked after at every training step, so that it is quick where nothing has changed. What is ``beside`` it, as the
    model is, is not copied where the module refers to it.

    >>> hparams = nn.ParameterDict({"decay": nn.Parameter(Tensor([1.0]))})
    >>> twin = DetachedView(hparams)
    >>> hparams["decay"].data.fill_(2.0)
    tensor([2.])
    >>> with twin.present() as seen:
    ...     seen["decay"], seen["decay"].requires_grad
    (Parameter containing:
    tensor([2.]), False)
    """

    def __init__(self, module: nn.Module, beside: nn.Module | None = None) -> None:
        self.module, self.beside = module, beside
        self._made()

    def _made(self) -> None:
        kept = () if (model := self.beside) is None else (*model.modules(), *model.parameters(), *model.buffers())
        memo: dict[int, Any] = {id(one): one for one in kept}  # the hyperparameters' module may refer to the model
        memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.module.parameters()}
        memo |= {id(buffer): buffer for buffer in self.module.buffers()}
        self._copy = copy.deepcopy(self.module, memo)
        self._parts = list(zip(self.module.modules(), self._copy.modules(), strict=True))
        self._tensors = [(p, memo[id(p)]) for part, _ in self._parts for p in part._parameters.values() if p is not None]

    @contextmanager
    def present(self) -> Iterator[nn.Module]:
        """The copy, as ``module`` is now.

        Raises:
            ValueError: what runs inside has written into a hyperparameter.
        """
        if not self._in_step():
            self._made()
        versions = [q._version for _, q in self._tensors]
        yield self._copy
        if versions != [q._version for _, q in self._tensors]:
            written = next(p for (p, q), version in zip(self._tensors, versions, strict=True) if q._version != version)
            name = next(name for name, p in self.module.named_parameters() if p is written)
            raise ValueError(f"train_loss writes into hyperparameter {name!r}: {ONLY_READS}")

    def _in_step(self) -> bool:
        """Give the copy the modes, buffers and plain attributes; say whether it still is an image."""
        if [id(part) for part in self.module.modules()] != [id(part) for part, _ in self._parts]:
            return False
        tensors = [p for part, _ in self._parts for p in part._parameters.values() if p is not None]
        if len(tensors) != len(self._tensors):
            return False
        for p, (known, q) in zip(tensors, self._tensors, strict=True):
            if p is not known or p.data_ptr() != q.data_ptr() or p.dtype != q.dtype:
                return False
        for part, other in self._parts:
            live, own = vars(part), vars(other)
            own["_buffers"], own["training"] = part._buffers, part.training
            for key in live.keys() - _TORCHS:
                if own.get(key) is not (value := live[key]) and isinstance(value, _PLAIN):
                    own[key] = value
        return True
