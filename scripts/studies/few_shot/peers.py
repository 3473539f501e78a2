"""What higher 0.2.1, TorchOpt 0.7.3 and learn2learn 0.2.0 compute as the meta-gradient of a batch of few-shot tasks.

Each function takes the same arguments, follows the library's own few-shot example, and returns the same dict: dL/dλ by name,
where λ are the model's weights and L is the mean, over the K tasks, of the query loss after `steps` full-batch steps on the
task's support set. The model is left as it was: weights, buffers and `.grad`. All of its weights have to require gradients.

    support, query     tuples of tensors whose leading axis is that of the K tasks, such as x [K, n, 1] and y [K, n, 1]
    loss(model, batch) a scalar, of the tuple of one task's tensors; it calls the model and uses nothing else of it, since
                       the libraries hand it their own wrappers

Install, without the dependencies, which name much that these functions do not use:

    pip install --no-deps higher==0.2.1
    pip install --no-deps torchopt==0.7.3 optree graphviz
    pip install --no-deps --config-settings=--build-option=build_ext learn2learn==0.2.0 gym==0.26.2 gym-notices cloudpickle

learn2learn 0.2.0 ships C files that do not compile for Python 3.11 and later ("longintrepr.h: No such file or directory").
The setting has its setup.py make them anew with Cython. It imports gym, which says on stderr that it is unmaintained, and
installs a package named "tests" beside its own.

A task's graph is freed before the next is built, as in the examples of higher and learn2learn. With ``at_once=True`` one
backward pass at the end serves all K tasks, as in TorchOpt's example. That takes up to K times the memory; it is a tenth
faster on a small net with one step, and no faster on larger ones (check_peers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Batch = tuple[Tensor, ...]
Loss = Callable[[Any, Batch], Tensor]
Grads = dict[str, Tensor]

INSTALL = {
    "higher": "higher==0.2.1",
    "torchopt": "torchopt==0.7.3 optree graphviz",
    "learn2learn": "--config-settings=--build-option=build_ext learn2learn==0.2.0 gym==0.26.2 gym-notices cloudpickle",
}


def higher_maml(
    model: nn.Module,
    loss: Loss,
    support: Batch,
    query: Batch,
    *,
    steps: int,
    lr: float | None = None,
    first_order: bool = False,
    at_once: bool = False,
    inner: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> Grads:
    """MAML with ``innerloop_ctx``. ``inner(parameters)`` makes another inner optimizer than ``SGD(lr)``, such as Adam.

    higher's Adam adds eps before the second moment is corrected, and torch's after: the steps differ where gradients are not
    much larger than eps. ``maximize=True`` is passed over.

    First-order: higher has no setting for it. With ``track_higher_grads=False`` the steps are those of its test mode, and
    the gradient is taken at the adapted weights.
    """
    higher = library("higher")
    if (lr is None) == (inner is None):
        raise ValueError(f"give lr or inner, and not both: lr={lr}, inner={inner}")
    optimizer = inner(model.parameters()) if inner else torch.optim.SGD(model.parameters(), lr=lr)  # type: ignore[arg-type]
    weights, mean = list(model.parameters()), Mean(support, at_once)
    for train, test in tasks(support, query):
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, track_higher_grads=not first_order) as pair:
            fast, diffopt = pair
            for _ in range(steps):
                diffopt.step(loss(fast, train))
            mean.add(loss(fast, test), list(fast.parameters()) if first_order else weights)
    return mean.by_name(model)


def torchopt_maml(
    model: nn.Module,
    loss: Loss,
    support: Batch,
    query: Batch,
    *,
    steps: int,
    lr: float,
    first_order: bool = False,
    at_once: bool = False,
) -> Grads:
    """MAML with ``MetaSGD``, where module and state are put back after each task.

    Wrong for tied weights, which a step of TorchOpt unties.

    First-order: ``MetaSGD`` always records the graph of its steps, so ``torchopt.SGD`` takes them, on copies of the weights.
    """
    torchopt = library("torchopt")
    weights, mean = list(model.parameters()), Mean(support, at_once)
    net = torchopt.module_clone(model, by="reference", detach_buffers=True)  # the same weights, but buffers of its own
    if first_order:
        for train, test in tasks(support, query):
            torchopt.recover_state_dict(net, torchopt.extract_state_dict(model, by="deepcopy"))
            fast = tuple(net.parameters())
            sgd = torchopt.SGD(fast, lr=lr)
            for _ in range(steps):
                sgd.zero_grad(set_to_none=True)
                loss(net, train).backward(inputs=fast)
                sgd.step()
            mean.add(loss(net, test), fast)
        return mean.by_name(model)
    optimizer = torchopt.MetaSGD(net, lr=lr)
    start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    state = torchopt.extract_state_dict(optimizer, by="reference")
    for train, test in tasks(support, query):
        for _ in range(steps):
            optimizer.step(loss(net, train))
        mean.add(loss(net, test), weights)
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(optimizer, state)
    return mean.by_name(model)


def torchopt_maml_vmap(
    model: nn.Module, loss: Loss, support: Batch, query: Batch, *, steps: int, lr: float, first_order: bool = False
) -> Grads:
    """MAML with the tasks batched by ``torch.func.vmap`` and TorchOpt's functional SGD, as in its functorch example.

    Two differences from that example. It drops the running statistics of BatchNorm; here each task has its own. It calls
    ``backward`` outside vmap, where torch 2.13 silently gets the second derivative of BatchNorm with weights wrong; here
    ``torch.func.grad`` is inside, which is right.
    """
    torchopt = library("torchopt")
    whole, count = Whole(model, loss), len(support[0])
    names, start = zip(*whole.named_parameters(), strict=True)
    buffers = {name: buffer.expand(count, *buffer.shape) for name, buffer in whole.named_buffers()}

    def call(weights: Sequence[Tensor], own: Grads, batch: Batch) -> Tensor:
        own = {name: buffer.clone() for name, buffer in own.items()}  # torch.func forbids writing into those given
        return functional_call(whole, {**dict(zip(names, weights, strict=True)), **own}, (batch,))

    def query_loss(weights: Sequence[Tensor], own: Grads, train: Batch, test: Batch) -> Tensor:
        sgd = torchopt.sgd(lr=lr)
        state = sgd.init(weights)
        for _ in range(steps):
            grads = torch.func.grad(call)(weights, own, train)
            grads = tuple(g.detach() for g in grads) if first_order else grads
            updates, state = sgd.update(grads, state, inplace=False)
            weights = torchopt.apply_updates(weights, updates, inplace=False)
        return call(weights, own, test)

    of_each = torch.func.vmap(torch.func.grad(query_loss), in_dims=(None, 0, 0, 0), randomness="different")
    mean = Mean(support)
    mean.put([g.sum(0) for g in of_each(start, buffers, support, query)])
    return mean.by_name(model)


def learn2learn_maml(
    model: nn.Module,
    loss: Loss,
    support: Batch,
    query: Batch,
    *,
    steps: int,
    lr: float,
    first_order: bool = False,
    at_once: bool = False,
) -> Grads:
    """MAML with ``MAML(model, lr).clone()`` and ``adapt``."""
    maml = library("learn2learn").algorithms.MAML(model, lr=lr, first_order=first_order)
    weights, mean = list(model.parameters()), Mean(support, at_once)
    with buffers_restored(model):
        for train, test in tasks(support, query):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(loss(learner, train))
            mean.add(loss(learner, test), weights)
        return mean.by_name(model)


def learn2learn_meta_sgd(
    model: nn.Module, rates: Mapping[str, Tensor], loss: Loss, support: Batch, query: Batch, *, steps: int
) -> tuple[Grads, Grads]:
    """Meta-SGD: the gradients of the weights and of the inner rates, which have the names and the shapes of the weights.

    Wrong for tied weights, which a step of its Meta-SGD unties.
    """
    leaves = rate_leaves(model, rates)
    meta = library("learn2learn").algorithms.MetaSGD(model, lrs=list(leaves.values()))
    weights, mean = list(model.parameters()), Mean(support)
    with buffers_restored(model):
        for train, test in tasks(support, query):
            learner = meta.clone()
            for _ in range(steps):
                learner.adapt(loss(learner, train))
            mean.add(loss(learner, test), [*weights, *leaves.values()])
        return halves(mean.result(), leaves)


def torchopt_imaml(
    model: nn.Module,
    loss: Loss,
    support: Batch,
    query: Batch,
    *,
    steps: int,
    lr: float,
    strength: float,
    terms: int,
    solver: str = "solve_cg",
    rtol: float = 0.0,
) -> Grads:
    """iMAML with ``custom_root``: SGD on the loss + strength/2 ‖w − λ‖², then strength · (A + strength I)⁻¹ g, A at its end.

    TorchOpt's example solves with ``solver="solve_normal_cg"``, on the square of the matrix, and with ``rtol=1e-5``, its
    default. Here it is ``solve_cg``, for A is symmetric, with exactly ``terms`` iterations.
    """
    torchopt = library("torchopt")
    call, start = functional(model, loss), tuple(model.parameters())

    def objective(weights: Sequence[Tensor], start: Sequence[Tensor], batch: Batch) -> Tensor:
        apart = sum(torch.sum(torch.square(w - s)) for w, s in zip(weights, start, strict=True))
        return call(weights, batch) + 0.5 * strength * apart

    def trained(weights: Sequence[Tensor], start: Sequence[Tensor], batch: Batch) -> Sequence[Tensor]:
        sgd = torchopt.sgd(lr=lr)
        state = sgd.init(weights)
        with torch.enable_grad():
            for _ in range(steps):
                grads = torch.autograd.grad(objective(weights, start, batch), weights)
                updates, state = sgd.update(grads, state, inplace=True)
                weights = torchopt.apply_updates(weights, updates, inplace=True)
        return weights

    solve = getattr(torchopt.linear_solve, solver)(maxiter=terms, rtol=rtol, atol=0.0)
    adapted = torchopt.diff.implicit.custom_root(torch.func.grad(objective), argnums=1, solve=solve)(trained)
    mean = Mean(support)
    for train, test in tasks(support, query):
        copies = tuple(w.detach().clone().requires_grad_() for w in start)
        mean.add(call(adapted(copies, start, train), test), start)
    return mean.by_name(model)


def plain_maml(
    model: nn.Module,
    loss: Loss,
    support: Batch,
    query: Batch,
    *,
    steps: int,
    lr: float,
    first_order: bool = False,
    at_once: bool = False,
) -> Grads:
    """MAML as a loop of ``autograd.grad``: what the libraries are compared with."""
    call, start, mean = functional(model, loss), list(model.parameters()), Mean(support, at_once)
    for train, test in tasks(support, query):
        weights: Sequence[Tensor] = start
        for _ in range(steps):
            grads = torch.autograd.grad(call(weights, train), weights, create_graph=not first_order)
            weights = [w - lr * g for w, g in zip(weights, grads, strict=True)]
        mean.add(call(weights, test), start)  # in first order the steps add constants, so this is that at their end
    return mean.by_name(model)


def plain_meta_sgd(
    model: nn.Module, rates: Mapping[str, Tensor], loss: Loss, support: Batch, query: Batch, *, steps: int
) -> tuple[Grads, Grads]:
    """Meta-SGD as a loop of ``autograd.grad``."""
    call, start, mean = functional(model, loss), list(model.parameters()), Mean(support)
    leaves = rate_leaves(model, rates)
    for train, test in tasks(support, query):
        weights: Sequence[Tensor] = start
        for _ in range(steps):
            grads = torch.autograd.grad(call(weights, train), weights, create_graph=True)
            weights = [w - rate * g for w, rate, g in zip(weights, leaves.values(), grads, strict=True)]
        mean.add(call(weights, test), [*start, *leaves.values()])
    return halves(mean.result(), leaves)


def plain_imaml(
    model: nn.Module,
    loss: Loss,
    support: Batch,
    query: Batch,
    *,
    steps: int,
    lr: float,
    strength: float,
    terms: int,
) -> Grads:
    """iMAML as loops of ``autograd.grad``, with the textbook's conjugate gradients from zero."""
    call, start, mean = functional(model, loss), list(model.parameters()), Mean(support)
    for train, test in tasks(support, query):
        weights = [w.detach().clone().requires_grad_() for w in start]
        for _ in range(steps):
            grads = torch.autograd.grad(call(weights, train), weights)
            with torch.no_grad():
                for w, s, g in zip(weights, start, grads, strict=True):
                    w -= lr * (g + strength * (w - s))
        b = flat(torch.autograd.grad(call(weights, test), weights))
        slope = flat(torch.autograd.grad(call(weights, train), weights, create_graph=True))
        x, r, p = torch.zeros_like(b), b, b
        for _ in range(terms):
            if not r.any():  # it is solved
                break
            Ap = flat(torch.autograd.grad(slope, weights, p, retain_graph=True)) + strength * p
            alpha = r.dot(r) / p.dot(Ap)
            x, before = x + alpha * p, r
            r = r - alpha * Ap
            p = r + r.dot(r) / before.dot(before) * p
        mean.put([part.view_as(w) for part, w in zip((strength * x).split([w.numel() for w in start]), start, strict=True)])
    return mean.by_name(model)


MAML: dict[str, Callable[..., Grads]] = {
    "plain autograd": plain_maml,
    "higher": higher_maml,
    "TorchOpt": torchopt_maml,
    "learn2learn": learn2learn_maml,
}
META_SGD: dict[str, Callable[..., tuple[Grads, Grads]]] = {
    "plain autograd": plain_meta_sgd,
    "learn2learn": learn2learn_meta_sgd,
}
IMAML: dict[str, Callable[..., Grads]] = {"plain autograd": plain_imaml, "TorchOpt": torchopt_imaml}


def library(name: str) -> Any:
    """The library, or an error that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not there ({error}): pip install --no-deps {INSTALL[name]}") from error


def tasks(support: Batch, query: Batch) -> Iterator[tuple[Batch, Batch]]:
    """The support and query tensors of one task after the other."""
    return zip(zip(*support, strict=True), zip(*query, strict=True), strict=True)


class Mean:
    """The mean over the tasks of the gradients of their query losses, each by its own backward pass or all by one."""

    def __init__(self, support: Batch, at_once: bool = False) -> None:
        self.count, self.at_once = len(support[0]), at_once
        self.sums: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.tensors: Sequence[Tensor] = ()

    def add(self, query_loss: Tensor, tensors: Sequence[Tensor]) -> None:
        if not self.at_once:
            return self.put(torch.autograd.grad(query_loss, tensors))
        if self.losses and tensors is not self.tensors:
            raise ValueError("at_once=True needs the same weights in all tasks: not with first_order=True here")
        self.tensors = tensors
        return self.losses.append(query_loss)

    def put(self, grads: Sequence[Tensor]) -> None:
        self.sums = list(
            torch._foreach_add(self.sums, list(grads)) if self.sums else grads
        )  # not in place: they may share memory

    def result(self) -> list[Tensor]:
        if self.at_once:
            self.put(torch.autograd.grad(torch.stack(self.losses).sum(), self.tensors))
        return list(torch._foreach_div(self.sums, self.count))

    def by_name(self, model: nn.Module) -> Grads:
        return dict(zip([name for name, _ in model.named_parameters()], self.result(), strict=True))


class Whole(nn.Module):
    """The loss as a module, so that ``functional_call`` reaches the weights of the model in it."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, batch)


def functional(model: nn.Module, loss: Loss) -> Callable[[Sequence[Tensor], Batch], Tensor]:
    """The loss as a function of the weights, in the model's order, and a batch. What it writes into buffers is dropped."""
    whole = Whole(model, loss)
    names, buffers = [name for name, _ in whole.named_parameters()], dict(whole.named_buffers())

    def call(weights: Sequence[Tensor], batch: Batch) -> Tensor:
        own = {name: buffer.clone() for name, buffer in buffers.items()}  # torch.func forbids writing into the model's
        return functional_call(whole, {**dict(zip(names, weights, strict=True)), **own}, (batch,))

    return call


def rate_leaves(model: nn.Module, rates: Mapping[str, Tensor]) -> Grads:
    """The rates as leaves, in the order of the model's weights."""
    names = [name for name, _ in model.named_parameters()]
    if set(names) != set(rates):
        raise ValueError(f"rates have the names {sorted(rates)}, and the weights {sorted(names)}: give one a weight")
    return {name: rates[name].detach().requires_grad_() for name in names}


def halves(grads: Sequence[Tensor], leaves: Grads) -> tuple[Grads, Grads]:
    """The gradients of the weights and of the rates, both by name."""
    return dict(zip(leaves, grads[: len(leaves)], strict=True)), dict(zip(leaves, grads[len(leaves) :], strict=True))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """learn2learn's clones share the model's buffers, such as the running means of BatchNorm, and write into them."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
