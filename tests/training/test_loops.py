"""Loops as people write them: accumulated gradients, closures, orders of calls; batches and loaders of every kind."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from cases import noisy_problem
from tiny import (
    BATCHES,
    VAL,
    direct_of,
    g_of,
    hess,
    joined,
    leaf_vector,
    mixed,
    tiny,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import BatchEncoding

import hoptim
from hoptim import (
    Averaged,
    BilevelOptimizer,
    Exact,
    FiniteDifference,
    GaussNewton,
    Implicit,
    Sampled,
    Unrolled,
    Update,
)
from hoptim.curvature.compiled import splitting
from hoptim.problem.data import Batches, MicroBatches
from hoptim.solvers.solution import Status


def optimizer_of(problem: hoptim.Problem, method: Any = None, inner: Any = None, **options: Any) -> BilevelOptimizer:
    inner = inner or torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
    outer = torch.optim.SGD(problem.hparams.parameters(), lr=0.1)
    options = {"val_batches": [VAL], "every": 1, **options}
    return BilevelOptimizer(inner, outer, problem, hypergradient=method, **options)


def take(optimizer: BilevelOptimizer, batches: Any, scale: float = 1.0) -> None:
    """One inner step, of several losses."""
    optimizer.zero_grad()
    for batch in batches:
        (scale * optimizer.loss(batch)).backward()
    optimizer.step()


def micro(batches: Any) -> MicroBatches:
    return MicroBatches(tuple(batches), torch.full((len(batches),), 1 / len(batches)))


def grads(optimizer: BilevelOptimizer) -> Tensor:
    assert optimizer.record is not None
    return leaf_vector(optimizer.record.result.grads)


# Gradient accumulation ----------------------------------------------------------------------------------------------

SOLVE = hoptim.MINRES(terms=6)
METHODS: dict[str, Any] = {
    "exact": Implicit(SOLVE, curvature=Exact()),
    "gauss-newton": Implicit(SOLVE, curvature=GaussNewton()),
    "differences": Implicit(SOLVE, curvature=FiniteDifference()),
    "averaged": Implicit(SOLVE, curvature=Averaged(batches=2, curvature=GaussNewton())),
    "sampled": Implicit(hoptim.Neumann(terms=6, step_size=0.1), curvature=Sampled()),
    "compiled": Implicit(SOLVE, curvature=GaussNewton(compile=True)),
    "update": Implicit(condition=Update()),
    "unrolled": Unrolled(3),
}


@pytest.mark.filterwarnings("error:hoptim")  # what can't be compiled is computed otherwise, with a word
@pytest.mark.parametrize("name", METHODS)
def test_several_micro_batches_are_the_one_batch_that_they_make(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(splitting, "compiled", lambda graph, _: lambda given: graph(*given))  # inductor has tests of its own
    problem, method = tiny(), METHODS[name]
    options: dict[str, Any] = {
        "inner": torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    }
    if name in ("averaged", "sampled"):
        options["train_batches"] = [BATCHES[4]]
    several = hoptim.hypergradient(problem, micro(BATCHES[:3]), VAL, method, **options)
    method = METHODS["gauss-newton"] if name == "compiled" else method
    one = hoptim.hypergradient(problem, joined(BATCHES[:3]), VAL, method, **options)
    tolerance = 1e-7 if name == "differences" else 1e-10
    torch.testing.assert_close(leaf_vector(several.grads), leaf_vector(one.grads), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(several.train_loss, one.train_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(several.gradient_norm, one.gradient_norm, rtol=1e-9, atol=0)
    other = hoptim.hypergradient(problem, BATCHES[2], VAL, method, **options)  # or the comparison would be worth nothing
    assert not torch.allclose(leaf_vector(several.grads), leaf_vector(other.grads), rtol=1e-2)


def test_an_audit_of_micro_batches_is_that_of_the_one_batch() -> None:
    problem = tiny()
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    found = [
        hoptim.audit(problem, batch, VAL, METHODS["gauss-newton"], inner=inner, steps=3, directions=0, longer=20)
        for batch in (micro(BATCHES[:2]), joined(BATCHES[:2]))
    ]
    several, one = found
    assert several.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-9)
    assert several.residuals == pytest.approx(one.residuals, rel=1e-6)
    assert [c.cosine for c in several.compared] == pytest.approx([c.cosine for c in one.compared], rel=1e-6)
    assert several.directions[0].measured == pytest.approx(one.directions[0].measured, rel=1e-4)


@pytest.mark.parametrize("method", ["exact", "update", "unrolled"])
def test_a_step_of_several_losses_is_the_step_of_the_one_batch(method: str) -> None:
    """(loss / n).backward() n times: hyperparameters and weights move as on the joined batch."""
    plans = ([BATCHES[:3], BATCHES[3:6]], [[joined(BATCHES[:3])], [joined(BATCHES[3:6])]])
    moved = []
    for plan in plans:
        problem = tiny()
        optimizer = optimizer_of(problem, Unrolled(2) if method == "unrolled" else METHODS[method], every=2)
        for batches in plan:
            take(optimizer, batches, 1 / len(batches))
        assert optimizer.record.moved
        moved.append(torch.cat([grads(optimizer), *(p.detach().flatten() for p in problem.model.parameters())]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["exact", "update"])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 4096.0])
def test_a_common_factor_of_the_losses_changes_nothing(scale: float, method: str) -> None:
    """Also not for Update, which takes the step to be that of the mean."""
    problem = tiny()
    inner = torch.optim.SGD(problem.model.parameters(), lr=1e-12)  # the weights stay, to be compared
    optimizer = optimizer_of(problem, METHODS[method], inner)
    expected = hoptim.hypergradient(problem, joined(BATCHES[:3]), VAL, METHODS[method], inner=inner)
    take(optimizer, BATCHES[:3], scale)
    torch.testing.assert_close(grads(optimizer), leaf_vector(expected.grads), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(optimizer.record.result.train_loss, expected.train_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shares", [(0.25, 0.75), (3.0, 1.0), (1.0, -1.0)])
@pytest.mark.parametrize("at_once", [True, False], ids=["sum", "one by one"])
def test_losses_count_with_what_they_are_multiplied_by(shares: tuple[float, float], at_once: bool) -> None:
    problem = tiny()
    method = Implicit(hoptim.MINRES(terms=60, tolerance=1e-13), curvature=Exact())
    optimizer = optimizer_of(problem, method, torch.optim.SGD(problem.model.parameters(), lr=0.0))
    size = sum(map(abs, shares))
    A = sum(s / size * hess(problem, b) for s, b in zip(shares, BATCHES[:2], strict=True))
    B = sum(s / size * mixed(problem, b) for s, b in zip(shares, BATCHES[:2], strict=True))
    expected = direct_of(problem) - B.T @ torch.linalg.solve(A, g_of(problem))
    optimizer.zero_grad()
    losses = [share * optimizer.loss(batch) for share, batch in zip(shares, BATCHES[:2], strict=True)]
    if at_once:
        sum(losses).backward()
    else:
        for loss in losses:
            loss.backward()
    optimizer.step()
    torch.testing.assert_close(grads(optimizer), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("composite", [True, False])
def test_masks_and_running_statistics_follow_the_order_of_the_batches(composite: bool) -> None:
    """As a loss that goes over the batches itself, to the last bits; dropout, BatchNorm in training."""
    problem, batches = (
        (tiny(dropout=0.4), BATCHES[:3]) if composite else (noisy_problem(), [*zip(*_classes(3), strict=True)])
    )
    val = VAL if composite else batches[0]

    def mean(model: Any, hparams: Any, several: Any) -> Tensor:
        return torch.stack([problem.train_loss(model, hparams, one) for one in several]).mean()

    whole = hoptim.Problem(problem.model, problem.hparams, mean, problem.val_loss)
    method = Implicit(hoptim.Neumann(terms=3, step_size=0.1), curvature=Exact())
    found, expected = (
        hoptim.hypergradient(which, batch, val, method) for which, batch in ((problem, micro(batches)), (whole, batches))
    )
    for name, value in expected.grads.items():
        torch.testing.assert_close(found.grads[name], value, rtol=1e-11, atol=1e-13)
    turned = hoptim.hypergradient(problem, micro(batches[::-1]), val, method)
    assert not torch.allclose(turned.train_loss, found.train_loss, rtol=1e-4)


def _classes(count: int) -> tuple[list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(8, 4, generator=draw) for _ in range(count)], [torch.arange(8) % 3 for _ in range(count)]


# Which batches belong to a step -------------------------------------------------------------------------------------


class Named:
    """A batch that says which it is."""

    def __init__(self, name: str) -> None:
        self.name, self.factor = name, float("abcdefgh".find(name) + 1)


def listening(**options: Any) -> tuple[BilevelOptimizer, list[str]]:
    """A BilevelOptimizer whose training loss notes the batches that it is called with."""
    seen: list[str] = []
    model, hparams = nn.Linear(2, 1, bias=False), nn.ParameterDict({"pull": nn.Parameter(torch.ones(2))})

    def train_loss(model: Any, hparams: Any, batch: Named) -> Tensor:
        seen.append(batch.name)
        return (batch.factor * model.weight - hparams["pull"]).square().sum()

    problem = hoptim.Problem(model, hparams, train_loss, lambda model, hparams, batch: model.weight.square().sum())
    return optimizer_of(
        problem, Implicit(), torch.optim.SGD(model.parameters(), lr=0.01), **{"every": None, **options}
    ), seen


# z zero_grad, m the model's own, a to h the loss of a batch, . its backward pass, + that of the sum of all that wait,
# ? a loss that nothing follows, ! one without gradients, s a step, i the inner optimizer's, then a hyperstep by hand.
ORDERS = {
    "z a . s": "a",
    "z a . b . s": "ab",
    "z a . b . s z": "ab",
    "z a b + s": "ab",
    "z a . b c + s": "abc",
    "a z . b . s": "ab",  # as Lightning has it
    "a z . s b z . c . s": "bc",
    "z a . s z b . c . s": "bc",
    "z a . z b . s": "b",
    "z a . s m b . c . s": "bc",
    "z a . m b . s": "b",
    "z a . i m b . i": "b",
    "z a . s b . s": "b",
    "z a . b! c . s": "ac",
    "z a . b? s": "a",
    "z a . s b?": "b",
    "z a . b?": "a",
    "a?": "a",
    "z a . a . s": "aa",
    "z a? z b . s": "b",
}


OFF_SCHEDULE = {  # what goes backward is not looked at: each loss since the last step counts
    "z a . s": "a",
    "z a . b . s": "ab",
    "a z . b . s": "ab",
    "z a . s z b . c . s": "bc",
    "z a . s z b?": "b",
    "z a . z a . z a . s": "a",  # a closure
    "z a . z b . s": "ab",
    "z a . b! c . s": "ac",
}
CALLS = [(order, None, expected) for order, expected in ORDERS.items()]
CALLS += [(f"z h . s {order}", 1000, expected) for order, expected in OFF_SCHEDULE.items()]  # the first step is looked at


@pytest.mark.parametrize(("order", "every", "expected"), CALLS)
def test_the_batches_of_the_last_step_are_those_of_a_hyperstep(order: str, every: int | None, expected: str) -> None:
    optimizer, seen = listening(every=every)
    waiting: list[Tensor] = []
    named: dict[str, Named] = {}
    actions: dict[str, Callable[[], Any]] = {
        "z": optimizer.zero_grad,
        "m": optimizer.problem.model.zero_grad,
        "s": optimizer.step,
        "i": optimizer.inner.step,
        ".": lambda: waiting.pop().backward(),
        "+": lambda: sum(waiting.pop() for _ in range(len(waiting))).backward(),
    }
    for action in order.split():
        if action in actions:
            actions[action]()
        elif action[-1] == "!":
            with torch.no_grad():
                optimizer.loss(Named(action[0]))
        else:
            loss = optimizer.loss(named.setdefault(action[0], Named(action[0])))
            waiting += [] if action[-1] == "?" else [loss]
    seen.clear()
    optimizer.hyperstep()
    assert "".join(seen) == expected


def test_a_closure_that_is_called_again_and_again_leaves_its_last_loss() -> None:
    optimizer, seen = listening(every=1)
    optimizer.inner = torch.optim.LBFGS(optimizer.problem.model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    for clear in (optimizer.zero_grad, optimizer.problem.model.zero_grad):
        seen.clear()
        batches = iter("abcdefgh")

        def closure(batches: Iterator[str] = batches, clear: Callable[[], None] = clear) -> Tensor:
            clear()
            loss = optimizer.loss(Named(next(batches)))
            loss.backward()
            return loss

        optimizer.step(closure)
        assert len(seen) > 2
        assert seen[-1] == seen[-2]  # the last of the closure, and that of the hyperstep, which is one


def test_a_closure_may_accumulate() -> None:
    optimizer, seen = listening(every=1)

    def closure() -> float:
        optimizer.zero_grad()
        for name in "ab":
            (optimizer.loss(Named(name)) / 2).backward()
        return 0.0

    assert optimizer.step(closure) == 0.0
    assert "".join(seen) == "a" + "ab" + "ab"  # the dry run, the step, the hyperstep


@pytest.mark.parametrize("train_batches", [None, BATCHES[3:4]], ids=["of the loop", "drawn"])
def test_what_the_models_own_zero_grad_clears_is_no_part_of_an_unrolled_step(train_batches: Any) -> None:
    optimizer = optimizer_of(tiny(), Unrolled(2), every=2, train_batches=train_batches)
    for batch in BATCHES[:2]:
        optimizer.loss(BATCHES[5]).backward()
        optimizer.problem.model.zero_grad()
        optimizer.loss(batch).backward()
        optimizer.step()
        optimizer.problem.model.zero_grad()
    assert optimizer.record.status is Status.FINISHED


def test_gradients_that_come_in_another_way_than_by_backward() -> None:
    optimizer, seen = listening(every=1)
    optimizer.zero_grad()
    loss = optimizer.loss(Named("a"))
    model = optimizer.problem.model
    model.weight.grad = torch.ones_like(model.weight) * loss.detach()
    with pytest.warns(UserWarning, match="the first step is not that of train_loss: their cosine is -0.94"):
        optimizer.step()
    assert seen == ["a"] * 4  # in the dry run, for the step, to compare gradients, in the hyperstep


def test_a_copy_within_a_window_has_the_window() -> None:
    optimizer, _ = listening()
    take(optimizer, [Named("a"), Named("b")])
    again = copy.deepcopy(optimizer)
    optimizer.hyperstep()
    again.hyperstep()
    assert torch.equal(*(o.problem.hparams["pull"] for o in (optimizer, again)))


def test_a_list_given_to_a_hyperstep_is_one_batch() -> None:
    """A DataLoader makes lists of (x, y): they are no micro-batches."""
    problem = tiny()
    optimizer = optimizer_of(problem, METHODS["exact"], every=None)
    expected = hoptim.hypergradient(problem, BATCHES[1], VAL, METHODS["exact"])
    record = optimizer.hyperstep(train_batch=list(BATCHES[1]))
    assert torch.equal(leaf_vector(record.result.grads), leaf_vector(expected.grads))


# Memory


def alive(seen: list[weakref.ref[Named]]) -> str:
    gc.collect()
    return "".join(sorted(batch.name for ref in seen if (batch := ref()) is not None))


def test_batches_are_held_no_longer_than_a_hyperstep_may_need_them() -> None:
    optimizer, _ = listening()
    refs: list[weakref.ref[Named]] = []
    losses = []  # as one who forgets detach() keeps them

    def loss(name: str) -> Tensor:
        batch = Named(name)
        refs.append(weakref.ref(batch))
        losses.append(optimizer.loss(batch))
        return losses[-1]

    for name in "abc":  # no step at all
        optimizer.zero_grad()
        loss(name).backward()
    assert alive(refs) == "c"
    optimizer.zero_grad()
    for name in "de":
        loss(name).backward()
    optimizer.step()
    assert alive(refs) == "de"
    optimizer.problem.model.zero_grad()
    loss("f").backward()
    assert alive(refs) == "f"


def test_no_batch_is_held_where_hypersteps_draw_their_own() -> None:
    optimizer, seen = listening(every=1, train_batches=[Named("b")])
    take(optimizer, [Named("a")])
    take(optimizer, [Named("a")])  # the first two steps hold theirs, to look at them
    seen.clear()
    batch = Named("a")
    ref = weakref.ref(batch)
    optimizer.loss(batch).backward()
    del batch
    assert alive([ref]) == ""
    optimizer.step()
    assert seen == ["a", "b"]


# Batches of every kind ----------------------------------------------------------------------------------------------


@dataclass
class Held:
    x: Tensor
    y: Tensor


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Custom:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._pair = x, y

    def to_pair(self) -> tuple[Tensor, Tensor]:
        return self._pair


def attributes(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.x, batch.y


def items(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["x"], batch["y"]


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tensor": (lambda x, y: torch.cat([x, y[:, None]], 1), lambda b: (b[:, :2], b[:, 2].long())),
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "list": (lambda x, y: [x, y], lambda b: (b[0], b[1])),
    "dict": (lambda x, y: {"x": x, "y": y}, items),
    "nested": (lambda x, y: {"in": (x, None), "y": [y, "name", 3]}, lambda b: (b["in"][0], b["y"][0])),
    "dataclass": (Held, attributes),
    "namedtuple": (Pair, attributes),
    "custom": (Custom, Custom.to_pair),
    "BatchEncoding": (lambda x, y: BatchEncoding({"x": x, "y": y}), items),
    "function": (lambda x, y: lambda: (x, y), lambda b: b()),
}


def reading(read: Callable[[Any], Any], read_val: Callable[[Any], Any] = lambda b: b) -> hoptim.Problem:
    base = tiny()
    loss: Any = base.train_loss
    train = hoptim.CompositeLoss(
        lambda m, h, b: loss.predict(m, h, read(b)), lambda z, h, b: loss.criterion(z, h, read(b)), loss.penalty
    )
    return hoptim.Problem(base.model, base.hparams, train, lambda m, h, b: base.val_loss(m, h, read_val(b)))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_may_be_anything(kind: str) -> None:
    """Training batches of the kind, and validation batches of another structure; one a step, and two."""
    make, read = KINDS[kind]
    answers = []
    for problem, batches in ((reading(read), [make(*b) for b in BATCHES[:3]]), (reading(lambda b: b), BATCHES[:3])):
        optimizer = optimizer_of(problem)
        take(optimizer, batches[:1])
        first = grads(optimizer)
        take(optimizer, batches[1:])
        answers.append((first, grads(optimizer)))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_validation_batches_may_be_anything(kind: str) -> None:
    make, read = KINDS[kind]
    optimizer = optimizer_of(reading(lambda b: b, read), val_batches=[make(*VAL)])
    take(optimizer, BATCHES[:1])
    expected = optimizer_of(tiny())
    take(expected, BATCHES[:1])
    assert torch.equal(grads(optimizer), grads(expected))


def test_losses_that_need_no_batch_are_given_none() -> None:
    optimizer = optimizer_of(reading(lambda _: BATCHES[0], lambda _: VAL), val_batches=[None])
    take(optimizer, [None])
    expected = optimizer_of(tiny())
    take(expected, BATCHES[:1])
    assert torch.equal(grads(optimizer), grads(expected))


# Loaders


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 18

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = joined(BATCHES)
        return x[i], y[i]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([Rows()[i] for i in range(18)])


class Spent(IterableDataset[Any]):
    """Iterable once, though it does not look so."""

    def __init__(self) -> None:
        self.rows = iter([Rows()[i] for i in range(18)])

    def __iter__(self) -> Iterator[Any]:
        return self.rows


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(Rows(), 6),
    "stream": lambda: DataLoader(Stream(), 6),
    "workers": lambda: DataLoader(Rows(), 6, num_workers=2, persistent_workers=True),
}


def run_of(loader: Any, **options: Any) -> tuple[list[int], Tensor]:
    """Two passes over the loader, with a hyperstep a step: the batches seen, and the last hypergradient."""
    optimizer, seen = optimizer_of(tiny(), **options), []
    for _ in range(2):
        for batch in itertools.islice(loader, 4):  # a pass that is begun again and again would never end
            seen.append(int(sum((batch[0][0] == x).all() * (i + 1) for i, x in enumerate(joined(BATCHES)[0]))))
            take(optimizer, [batch])
    return seen, grads(optimizer)


@pytest.mark.parametrize("name", LOADERS)
def test_one_loader_serves_the_loop_and_both_kinds_of_hyperstep_batches(name: str) -> None:
    """Workers that persist have one iterator for all, and a hyperstep's draw would move the loop's."""
    loader = LOADERS[name]()
    seen, last = run_of(loader, train_batches=loader, val_batches=loader)
    assert seen == [1, 7, 13, 1, 7, 13]
    rows = joined(BATCHES)
    batches = [(rows[0][i : i + 6], rows[1][i : i + 6]) for i in (0, 6, 12)]
    assert torch.equal(last, run_of(batches, train_batches=batches, val_batches=batches)[1])


def test_a_loader_with_workers_that_persist_is_copied_with_its_place() -> None:
    batches = Batches(LOADERS["workers"](), "val_batches")
    batches.draw()
    again = copy.deepcopy(batches)
    assert torch.equal(batches.draw()[0], again.draw()[0])


@pytest.mark.parametrize("what", ["val_batches", "train_batches"])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: [], "is empty: it must hold"),
        (lambda: DataLoader(Rows(), 20, drop_last=True), "is empty: it must hold .* drop_last"),
        (lambda: iter([VAL]), "one-shot iterator"),
        (lambda: (batch for batch in [VAL]), "one-shot iterator"),
        (lambda: VAL[0], "give a DataLoader, a list"),
        (lambda: DataLoader(Stream(), 20, drop_last=True), "is empty: it gave no batch"),
        (lambda: DataLoader(Spent(), 6), "is empty on a new pass, after 2 batches: give what can be iterated again"),
    ],
)
def test_a_source_that_has_no_batch_is_named(source: Callable[[], Any], message: str, what: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{what} .*{message}|^{what} {message}"):
        run_of([VAL] * 4, **{what: source()})


# Losses that are not finite, and loops that stop


@pytest.mark.parametrize("where", ["validation", "training"])
def test_a_batch_without_examples_moves_nothing_and_is_named(where: str) -> None:
    problem, empty = tiny(), (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    optimizer = optimizer_of(problem, every=None)
    before = [p.detach().clone() for p in (*problem.model.parameters(), *problem.hparams.parameters())]
    batches = (micro([BATCHES[0], empty]), VAL) if where == "training" else (BATCHES[0], empty)
    with pytest.warns(UserWarning, match=f"NON_FINITE_LOSS.*the {where} loss is nan"):
        record = optimizer.hyperstep(*batches)
    assert (record.status, record.moved) == (Status.NON_FINITE_LOSS, False)
    after = [*problem.model.parameters(), *problem.hparams.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_loop_that_stops_in_the_middle_goes_on() -> None:
    """Also amid the micro-batches of a step: what was added up before belongs to the next one, unless it is cleared."""
    optimizer, seen = listening(every=1)
    take(optimizer, [Named("a")])
    optimizer.zero_grad()
    optimizer.loss(Named("b")).backward()
    seen.clear()
    optimizer.loss(Named("c")).backward()  # goes on
    optimizer.step()
    assert "".join(seen) == "c" + "bc"
    optimizer.zero_grad()
    optimizer.loss(Named("d")).backward()
    seen.clear()
    take(optimizer, [Named("e")])  # begins anew
    assert "".join(seen) == "e" + "e"


def test_a_step_without_a_loss_of_the_optimizers_is_an_error() -> None:
    problem = tiny()
    optimizer = optimizer_of(problem)
    problem.train_loss(problem.model, problem.hparams, BATCHES[0]).backward()
    with pytest.raises(ValueError, match=r"optimizer.loss\(batch\)"):
        optimizer.step()


def test_losses_that_count_for_nothing_are_no_fault() -> None:
    optimizer, _ = listening()
    for name in "ab":
        (0 * optimizer.loss(Named(name))).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="NO_CURVATURE"):
        record = optimizer.hyperstep()
    assert record.status.name == "NO_CURVATURE"
    assert record.result.train_loss == 0
