"""Other public libraries on the same problem, with the same terms and step. Answers are compared before they are timed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from studies.benchmark.cases import PROBLEMS, Case, difference, make
from studies.benchmark.measure import Calls, Row, in_turn, ratio
from studies.benchmark.sections import neumann
from torch import Tensor

import hoptim

TERMS, SHARE = 20, 0.2  # the step size is this share of 1 / ‖A‖, large enough to show a wrong product in the answer
Call = Callable[[], list[Any]]


def by_hoptim(case: Case, terms: int, step: float, *, compile: bool = False) -> Call:
    method = hoptim.Implicit(hoptim.Neumann(terms=terms, step_size=step), curvature=hoptim.Exact(compile=compile))
    return lambda: list(case.implicit(method).grads.values())


def by_betty(case: Case, terms: int, step: float) -> Call:
    """betty's backward pass of the upper problem alone, without the steps that its engine takes before and after."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return case.problem.val_loss(self.lower.module, self.module, batch)

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            self.module.train()
            return case.problem.train_loss(self.module, self.upper.module, batch)

    def part(kind: type, name: str, module: Any, batch: Any, **options: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=step)
        config = Config(retain_graph=True, **options)
        return kind(name=name, config=config, module=module, optimizer=optimizer, train_data_loader=[batch])

    upper = part(Upper, "upper", case.problem.hparams, case.val_batch)
    options = {"type": "neumann", "neumann_iterations": terms, "neumann_alpha": step}
    lower = part(Lower, "lower", case.problem.model, case.batch, **options)
    logging.disable(logging.INFO)
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    Engine(problems=[upper, lower], config=EngineConfig(strategy="cpu"), dependencies=dependencies)
    lower.cur_batch = case.batch

    def call() -> list[Tensor]:
        params = upper.trainable_parameters()
        with case.unfused():
            loss = upper.training_step_exec(case.val_batch)
            upper.backward(loss, params, upper.paths, create_graph=False, retain_graph=True, allow_unused=True)
        found = [p.grad for p in params]
        upper.zero_grad()
        return found

    return call


def by_torchopt(case: Case, terms: int, step: float) -> Call:
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_inv

    train, validate = case.function("train_loss"), case.function("val_loss")
    weights, leaves = tuple(case.problem.model.parameters()), tuple(case.problem.hparams.parameters())

    def optimality(weights: Any, leaves: Any) -> Any:
        return torch.func.grad(train)(weights, leaves)

    @custom_root(optimality, argnums=1, solve=solve_inv(ns=True, maxiter=terms, alpha=step))
    def solved(weights: Any, leaves: Any) -> Any:
        return weights

    def call() -> list[Tensor]:
        with case.unfused():
            return list(torch.autograd.grad(validate(solved(weights, leaves), leaves), leaves))

    return call


def by_higher(case: Case, terms: int, step: float) -> Call:
    """Unrolls the same number of steps from the current weights; it is compared with unrolling by hand."""
    import higher

    problem, leaves = case.problem, list(case.problem.hparams.parameters())
    sgd = torch.optim.SGD(problem.model.parameters(), lr=step)

    def call() -> list[Tensor]:
        with case.unfused(), higher.innerloop_ctx(problem.model, sgd) as (model, inner):
            for _ in range(terms):
                model.train()
                inner.step(problem.train_loss(model, problem.hparams, case.batch))
            return list(torch.autograd.grad(problem.val_loss(model, problem.hparams, case.val_batch), leaves))

    return call


def by_jaxopt(case: Case, terms: int, step: float) -> Call:
    """jaxopt under jit, on one thread, with weights and batches converted beforehand."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    import jax
    from jax import numpy as jnp
    from jaxopt.implicit_diff import custom_root

    forward, kind = jax_forward(jax, jnp, case), case.name.split(",")[0]
    add = lambda x, y, scale=1.0: jax.tree.map(lambda a, b: a + scale * b, x, y)  # noqa: E731

    def losses(weights: Any, batch: Any) -> Any:
        logits = forward(weights, batch[0])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=1)[:, 0]

    def train(weights: Any, leaves: Any, batch: Any) -> Any:
        if kind == "logistic":
            penalty = 1e-3 * sum((weight**2).sum() for weight in weights.values())
            return (leaves["example"] * losses(weights, batch)).mean() + 0.5 * penalty
        penalty = sum((jnp.exp(leaves[name]) * weight**2).sum() for name, weight in weights.items())
        return losses(weights, batch).mean() + 0.5 * penalty

    def series(matvec: Any, b: Any) -> Any:
        def body(_: int, state: Any) -> Any:
            vector = add(state[0], matvec(state[0]), -step)
            return vector, add(state[1], vector)

        return jax.tree.map(lambda total: step * total, jax.lax.fori_loop(0, terms, body, (b, b))[1])

    @jax.jit
    def hypergradient(weights: Any, leaves: Any, batch: Any, val_batch: Any) -> Any:
        optimality = lambda weights, leaves: jax.grad(train)(weights, leaves, batch)  # noqa: E731
        solved = custom_root(optimality, solve=series)(lambda weights, _: weights)
        return jax.grad(lambda leaves: losses(solved(weights, leaves), val_batch).mean())(leaves)

    move = lambda tensor: jnp.asarray(tensor.detach().numpy())  # noqa: E731
    weights = {name: move(value) for name, value in case.problem.model.named_parameters()}
    keys = list(weights) if kind != "logistic" else ["example"]
    leaves = {key: move(value) for key, value in zip(keys, case.problem.hparams.parameters(), strict=True)}
    batches = [(move(x), move(y)) for x, y in (case.batch, case.val_batch)]

    def call() -> list[Any]:
        found = jax.block_until_ready(hypergradient(weights, leaves, *batches))
        return [found[key] for key in keys]

    return call


def jax_forward(jax: Any, jnp: Any, case: Case) -> Callable[[Any, Any], Any]:
    """The five networks in JAX, as functions of weights under torch's names."""
    names = [name.removesuffix(".weight") for name, _ in case.problem.model.named_parameters() if name.endswith(".weight")]

    def linear(p: Any, name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    def mlp(p: Any, x: Any) -> Any:
        for name in names[:-1]:
            x = jax.nn.relu(linear(p, name, x))
        return linear(p, names[-1], x)

    def convolved(p: Any, name: str, x: Any) -> Any:
        x = jax.lax.conv_general_dilated(x, p[f"{name}.weight"], (1, 1), "SAME") + p[f"{name}.bias"][:, None, None]
        return jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def cnn(p: Any, x: Any) -> Any:
        x = convolved(p, names[1], convolved(p, names[0], x))
        return linear(p, names[2], x.reshape(len(x), -1))

    def normal(p: Any, name: str, x: Any) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attention(p: Any, x: Any) -> Any:
        (n, length, width), heads = x.shape, 4
        mixed = x @ p["layer.self_attn.in_proj_weight"].T + p["layer.self_attn.in_proj_bias"]
        q, k, v = (part.reshape(n, length, heads, -1).swapaxes(1, 2) for part in jnp.split(mixed, 3, axis=-1))
        share = jax.nn.softmax(q @ k.swapaxes(2, 3) / jnp.sqrt(width / heads))
        return linear(p, "layer.self_attn.out_proj", (share @ v).swapaxes(1, 2).reshape(n, length, width))

    def transformer(p: Any, x: Any) -> Any:
        x = normal(p, "layer.norm1", x + attention(p, x))
        hidden = jax.nn.relu(linear(p, "layer.linear1", x))
        x = normal(p, "layer.norm2", x + linear(p, "layer.linear2", hidden))
        return linear(p, "head", x.mean(1))

    return {"small CNN": cnn, "transformer": transformer}.get(case.name.split(",")[0], mlp)


LIBRARIES: dict[str, Callable[[Case, int, float], Call]] = {
    "hoptim": by_hoptim,
    "hoptim, compiled": partial(by_hoptim, compile=True),
    "betty-ml": by_betty,
    "torchopt": by_torchopt,
    "higher": by_higher,
    "jaxopt": by_jaxopt,
}


FUSED = ("jaxopt", "hoptim, compiled")  # they fuse operations into one graph


def peers(rounds: int) -> list[Row]:
    """Hypergradients with K = 20 and a step size of 0.2 / ‖A‖, relative to the loop by hand; "higher" unrolls 20 steps.

    The target of "hoptim, compiled" is jaxopt's figure, since both fuse operations.
    """
    rows = []
    for name in PROBLEMS:
        case = make(name, dropout=0.0)
        step = SHARE * neumann(case, 0)[2].step_size
        right, unrolled = case.by_hand(TERMS, step), case.unrolled(TERMS, step)
        calls: Calls = {"by hand": lambda c=case, a=step: c.by_hand(TERMS, a)}
        notes = {}
        for peer, build in LIBRARIES.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call = build(case, TERMS, step)
                    answer = [
                        torch.as_tensor(value.__array__().copy()) if not isinstance(value, Tensor) else value
                        for value in call()
                    ]
                at_most = 1e-3 if peer in FUSED else 1e-4  # fused float32 may flip a ReLU near zero
                error = difference(answer, unrolled if peer == "higher" else right, peer, at_most)
                calls[peer], notes[peer] = call, f"{error:.0e}"
            except Exception as error:  # the error becomes the library's row
                notes[peer] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times = in_turn(calls, rounds)
        for peer, note in notes.items():
            label = {"library": f"{peer} {release(peer)}".strip()}
            if peer not in calls:
                rows.append(Row(case.name, label, {"answer": note}))
                continue
            figures: dict[str, float | str] = {"answer": note, "call, ms": 1e3 * median(times[peer])}
            figures["over by hand"] = ratio(times, peer, "by hand")
            goals = {"hoptim": 1.02}
            if "jaxopt" in calls:
                goals["hoptim, compiled"] = ratio(times, "jaxopt", "by hand")
            rows.append(Row(case.name, label, figures, {"over by hand": goals[peer]} if peer in goals else {}))
    return rows


def release(peer: str) -> str:
    """The installed version of a library, or nothing."""
    try:
        return version(peer)
    except PackageNotFoundError:
        return ""
