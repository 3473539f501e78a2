"""Models of every kind: a library's, compiled, with hooks and caches, of any precision, without a second derivative."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cases import same
from plain import Predict, assert_as_plain, called, few, first, no_trace, plain, problem_of
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from versions import TORCH

import hoptim
from hoptim import CG, MINRES, Exact, FiniteDifference, Implicit, Neumann, Problem, Unrolled, WarmStart
from hoptim.problem.wrappers import Facade

DIFFERENCES = FiniteDifference()
BOTH = pytest.mark.parametrize("curvature", [Exact(), DIFFERENCES], ids=["exact", "differences"])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6, 4)), generator=torch.Generator().manual_seed(7))


def found_by(problem: Problem, curvature: Any = None, x: Tensor | None = None) -> Tensor:
    x = batch() if x is None else x
    return hoptim.hypergradient(problem, x, x, few(curvature)).grads["decay"]


# From a library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT on disk."""
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    config = transformers.BertConfig(vocab_size=9, max_position_embeddings=5, type_vocab_size=1, num_labels=3, **sizes)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bert")
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


def tokens() -> transformers.BatchEncoding:
    ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])})


def bert(folder: Path, attention: str, checkpointed: bool) -> Problem:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float64
    )
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    hparams = hoptim.HyperParameters({"decay": torch.tensor(0.01)})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return m(**b).loss + h["decay"] * sum(p.square().sum() for p in m.parameters())

    return Problem(model.train(), hparams, train, lambda m, h, b: m.eval()(**b).loss)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize(("attention", "checkpointed"), [("eager", False), ("sdpa", False), ("sdpa", True)])
def test_bert_from_a_folder(folder: Path, attention: str, checkpointed: bool) -> None:
    """A batch that is a dict, an output that is a dataclass, dropout, both kinds of attention."""
    reference = bert(folder, "eager", False)
    torch.manual_seed(3)
    expected, _ = plain(reference, tokens(), tokens(), dense=False)
    torch.manual_seed(3)
    problem = bert(folder, attention, checkpointed)
    torch.manual_seed(3)
    with no_trace(problem):
        found = hoptim.hypergradient(problem, tokens(), tokens(), few())
    torch.testing.assert_close(found.grads["decay"], expected["decay"], rtol=1e-8, atol=0)


@dataclass
class Output:
    z: Tensor
    hidden: Tensor


class Answering(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 3), nn.Linear(3, 2), kind

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).tanh()
        z = self.b(hidden)
        return {"dict": {"z": z, "hidden": hidden}, "tuple": (z, hidden), "dataclass": Output(z, hidden)}[self.kind]


READ: dict[str, Predict] = {"dict": lambda m, b: m(b)["z"], "tuple": lambda m, b: m(b)[0], "dataclass": lambda m, b: m(b).z}


@pytest.mark.parametrize("kind", READ)
def test_whatever_a_model_returns(kind: str) -> None:
    assert_as_plain(problem_of(Answering(kind), READ[kind]), batch(), batch() + 1)


# Compiled


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "in place":
        model.compile(backend="aot_eager")
        return model
    return torch.compile(model, backend=how)


LATE = """
import sys
import torch
from torch import nn
import hoptim

class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def eager(self, x):
        return self.layer(x).tanh()

    def forward(self, x):
        run = torch.compile(self.eager, backend="aot_eager") if "torch._dynamo" in sys.modules else self.eager
        return run(x)

def val_loss(model, hparams, x):
    import torch._dynamo
    return model(x).square().mean()

def train_loss(model, hparams, x):
    return model(x).square().mean() + hparams["a"] * model.layer.weight.square().sum()

problem = hoptim.Problem(Late(), hoptim.HyperParameters({"a": torch.tensor(0.1)}), train_loss, val_loss)
assert "torch._dynamo" not in sys.modules
x = torch.randn(5, 3)
found = [hoptim.hypergradient(problem, x, x, hoptim.Implicit(hoptim.CG(terms=3))).grads["a"] for _ in range(2)]
assert "torch._dynamo" in sys.modules
torch.testing.assert_close(*found)
print("the same")
"""


def test_a_compiler_that_is_first_imported_by_a_loss_is_stood_off_too() -> None:
    process = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert (process.stdout, process.returncode) == ("the same\n", 0), process.stderr


@pytest.mark.parametrize("how", ["eager", "aot_eager", "in place"])
def test_compiled_model_trains_compiled_and_is_differentiated_as_it_was_written(how: str) -> None:
    torch._dynamo.reset()
    ran: list[bool] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                return self.b(self.norm(self.a(x)).tanh()) + 0.0
            ran.append(True)
            return self.b(self.norm(self.a(x)).tanh())

    def predict(m: Any, x: Tensor) -> Tensor:
        assert [name for name, _ in m.named_parameters()] == [name for name, _ in bare.named_parameters()]
        assert isinstance(m, Net)
        return m(x)

    bare = Net()
    reference, problem = problem_of(copy.deepcopy(bare), predict), problem_of(compiled(bare, how), predict)
    x = batch()
    for _ in range(2):
        losses = [one.loss(x) for one in (problem, reference)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        assert ran == [True]  # of the two, only the bare one ran as Python
        gradients = [[p.grad for p in one.weights().values()] for one in (problem, reference)]
        torch.testing.assert_close(*gradients)
        with no_trace(problem):
            torch.testing.assert_close(found_by(problem), found_by(reference), rtol=1e-10, atol=0)
        ran.clear()
        for one in (problem, reference):
            one.model.zero_grad()


@pytest.mark.parametrize("how", ["given", "in place", "another's", "inside", "around a wrapper"])
def test_a_model_that_is_compiled_past_the_problem_is_told_once(how: str) -> None:
    torch._dynamo.reset()
    model = nn.Linear(4, 2)
    given = {"given": lambda: torch.compile(model, backend="eager"), "around a wrapper": lambda: nn.DataParallel(model)}
    problem = problem_of(given.get(how, lambda: model)())
    aside: Any = None
    if "in place" in how:
        model.compile(backend="eager")
    elif how == "another's":
        aside = torch.compile(nn.Linear(4, 2), backend="eager")
    elif how != "given":
        aside = torch.compile(problem.wrapper, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            problem.loss(batch())
    told = [str(one.message) for one in caught if "torch.compile" in str(one.message)]
    assert len(told) == (1 if how in ("inside", "around a wrapper") else 0), aside
    assert all("wraps the Linear" in one and "Give Problem what torch.compile returned" in one for one in told)


# Operations without a second derivative


class Once(torch.autograd.Function):
    """exp, whose backward pass says that it has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].exp()


class ViaData(Once):
    """The same, which does not say so."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].data.exp()


class ViaNumpy(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(g.detach().numpy() * np.exp(ctx.saved_tensors[0].detach().numpy()))


class Right(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].exp()


class Rectified(torch.autograd.Function):
    """Kinked: where it has a second derivative, that is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


def through(function: Any) -> Predict:
    return lambda m, b: function.apply(m(b))


EXPONENTIAL: Predict = lambda m, b: m(b).exp()  # noqa: E731


def test_once_differentiable_function_is_named_and_differences_serve() -> None:
    problem = problem_of(mlp(), through(Once))
    for method in (Implicit(), Unrolled(1)):
        with pytest.raises(TypeError, match=r"\['Once'\] are once_differentiable.*hoptim\.FiniteDifference\(\)"):
            hoptim.hypergradient(problem, batch(), batch(), method, inner=torch.optim.SGD(problem.model.parameters(), 0.1))
    expected, _ = plain(problem_of(problem.model, EXPONENTIAL), batch(), batch())
    torch.testing.assert_close(found_by(problem, DIFFERENCES), expected["decay"], rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [ViaData, ViaNumpy])
def test_backward_pass_that_only_looks_differentiable_is_found_out(function: Any, dtype: torch.dtype) -> None:
    """Compared with differences of gradients, once a problem; the differences themselves need no such look."""
    problem, x = problem_of(mlp().to(dtype), through(function)), batch().to(dtype)
    with no_trace(problem), pytest.warns(UserWarning, match=rf"\['{function.__name__}'\].*hoptim\.FiniteDifference"):
        found = found_by(problem, x=x)
    expected, _ = plain(problem_of(problem.model, EXPONENTIAL), x, x)
    assert not torch.allclose(found, expected["decay"], rtol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found_by(problem, x=x)  # it has been said
        right = found_by(problem_of(problem.model, through(function)), DIFFERENCES, x)
    torch.testing.assert_close(right, expected["decay"], rtol=1e-7 if dtype == torch.float64 else 1e-3, atol=0)
    inner = torch.optim.SGD(problem.model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="off by"):
        hoptim.hypergradient(problem_of(problem.model, through(function)), x, x, Unrolled(1), inner=inner)


def test_it_is_found_out_under_dropout_too() -> None:
    """All that is compared has one mask."""
    problem = problem_of(nn.Sequential(mlp(), nn.Dropout(0.5)), through(ViaData))
    with no_trace(problem), pytest.warns(UserWarning, match="off by"):
        found_by(problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("function", "by_torch"), [(Right, EXPONENTIAL), (Rectified, lambda m, b: m(b).relu())])
def test_right_custom_functions_pass_without_a_word(function: Any, by_torch: Predict, dtype: torch.dtype) -> None:
    model, x = nn.Sequential(mlp(), nn.Dropout(0.3)).to(dtype), batch().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_as_plain(problem_of(model, through(function)), x, x, error=1e-5 if dtype == torch.float32 else 1e-10)
        torch.manual_seed(3)
        found = found_by(problem_of(model, through(function)), x=x)
    torch.manual_seed(3)
    torch.testing.assert_close(found, found_by(problem_of(model, by_torch), x=x))


def fused(model: Any, x: Tensor) -> Tensor:
    """A model that insists on a kernel of its own choice."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        q, k, v = model(x)[:, None].chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


def by_parts(model: Any, x: Tensor) -> Tensor:
    q, k, v = model(x).chunk(3, dim=-1)
    return (q @ k.mT / 2).softmax(-1) @ v


def embedded(model: Any, x: Tensor) -> Tensor:
    return F.embedding(x, model.weight).mean(1)


ONCE: dict[str, tuple[Callable[[], nn.Module], Predict, Predict, Callable[[], Tensor]]] = {
    "hardsigmoid": (mlp, lambda m, b: F.hardsigmoid(m(b)), lambda m, b: (m(b) / 6 + 0.5).clamp(0, 1), batch),
    "cdist": (
        mlp,
        lambda m, b: torch.cdist(m(b), b[:2, :2]),
        lambda m, b: (m(b)[:, None] - b[:2, :2]).norm(dim=-1),
        batch,
    ),
    "embedding_bag": (lambda: nn.EmbeddingBag(5, 3), called, embedded, lambda: torch.tensor([[0, 1], [2, 1]])),
    "flash_attention": (lambda: nn.Linear(4, 12), fused, by_parts, lambda: batch(2, 3, 4)),
}


@pytest.mark.parametrize("name", ONCE)
def test_operation_without_a_second_derivative_is_named_and_differences_serve(name: str) -> None:
    make, predict, other, draw = ONCE[name]
    problem, x = problem_of(make(), predict), draw()
    reshaped: Predict = lambda m, b: other(m, b).reshape(predict(m, b).shape)  # noqa: E731
    expected, _ = plain(problem_of(problem.model, reshaped), x, x, dense=False)
    if name == "cdist" and TORCH >= (2, 14):  # which gave it one
        torch.testing.assert_close(found_by(problem, x=x), expected["decay"])
    else:
        with no_trace(problem), pytest.raises(TypeError, match=rf"no second derivative: .*{name}.*FiniteDifference\(\)"):
            found_by(problem, x=x)
    torch.testing.assert_close(found_by(problem, DIFFERENCES, x), expected["decay"], rtol=1e-6, atol=0)


@BOTH
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.filterwarnings("error")
def test_reentrant_checkpointing(at: int, curvature: Any) -> None:
    """``autograd.grad`` passes it by, or refuses: inside it is done the other way."""

    def predict(model: Any, x: Tensor) -> Tensor:
        return checkpoint(model[at:], model[:at](x), use_reentrant=True)

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.4), nn.Tanh(), nn.Linear(3, 2))
    problem = problem_of(model, predict)
    torch.manual_seed(3)
    expected, _ = plain(problem_of(model), batch(), batch())
    torch.manual_seed(3)
    with no_trace(problem):
        found = found_by(problem, curvature)
    torch.testing.assert_close(found, expected["decay"], rtol=1e-7, atol=0)


@BOTH
def test_sparse_embeddings_are_dense_inside(curvature: Any) -> None:
    model, x = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Tanh(), nn.Linear(3, 2)), torch.tensor([[0, 1], [2, 1]])
    problem, dense = problem_of(model), copy.deepcopy(model)
    dense[0].sparse = False
    expected, _ = plain(problem_of(dense), x, x)
    torch.testing.assert_close(found_by(problem, curvature, x), expected["decay"], rtol=1e-7, atol=0)
    assert model[0].sparse


# Precisions, and values that are no real numbers


@pytest.mark.parametrize(
    ("dtypes", "error"),
    [
        ((torch.float64, torch.float64), 1e-10),
        ((torch.float32, torch.float32), 1e-5),
        ((torch.float32, torch.float64), 1e-5),
        ((torch.bfloat16, torch.bfloat16), 0.02),
        ((torch.float16, torch.float16), 0.005),
        ((torch.float32, torch.bfloat16), 0.02),
    ],
    ids=repr,
)
def test_weights_of_any_precision(dtypes: tuple[torch.dtype, torch.dtype], error: float) -> None:
    lower, upper = (nn.Linear(4, 3).to(dtypes[0]), nn.Linear(3, 2).to(dtypes[1]))
    model = nn.ModuleDict({"lower": lower, "upper": upper})

    def predict(m: Any, x: Tensor) -> Tensor:
        z = m["lower"](x.to(m["lower"].weight.dtype)).tanh()
        return m["upper"](z.to(m["upper"].weight.dtype)).double()

    expected, _ = plain(problem_of(copy.deepcopy(model).double(), predict), batch(), batch())
    problem = problem_of(model, predict)
    with no_trace(problem):
        found = found_by(problem)
    torch.testing.assert_close(found, expected["decay"], rtol=error, atol=0)


class Complex(nn.Module):
    """A complex matrix, kept as it is or as its two parts."""

    def __init__(self, as_parts: bool) -> None:
        super().__init__()
        w = torch.randn(4, 2, dtype=torch.complex128)
        self.w, self.as_parts = nn.Parameter(torch.view_as_real(w) if as_parts else w), as_parts

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ (torch.view_as_complex(self.w) if self.as_parts else self.w)).abs()


def test_complex_weights_are_refused_and_their_parts_serve() -> None:
    with pytest.raises(TypeError, match=r"weight 'w' is torch\.complex128.*view_as_real"):
        problem_of(Complex(as_parts=False))
    assert_as_plain(problem_of(Complex(as_parts=True)), batch(), batch())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"weight '0\.weight' is not initialised yet: run the model"),
        (lambda: nn.Linear(4, 3, device="meta"), r"weight 'weight' is on the meta device"),
    ],
)
def test_weights_without_values_are_refused_at_once(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem_of(model())


# What hangs on a model


def test_forward_hooks_are_part_of_the_model_and_backward_hooks_rest() -> None:
    model, fired = mlp(), []
    model[0].register_forward_hook(lambda m, args, z: z * 2)
    model[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    expected, _ = plain(problem_of(copy.deepcopy(model)), batch(), batch())
    for module in model:
        module.register_full_backward_hook(lambda m, given, out: fired.append("module"))
        module.register_full_backward_pre_hook(lambda m, out: fired.append("before"))
    for p in model.parameters():
        p.register_hook(lambda g: fired.append("tensor"))
        p.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, given, out: fired.append("any"))
    problem = problem_of(model)
    try:
        with no_trace(problem), warnings.catch_warnings():
            warnings.simplefilter("error")
            found = found_by(problem)
            found_by(problem, DIFFERENCES)
        assert fired == []
        problem.loss(batch().requires_grad_()).backward()
        assert set(fired) == {"module", "before", "tensor", "accumulated", "any"}
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected["decay"], rtol=1e-10, atol=0)


class Caching(nn.Module):
    """Writes all over itself, and reads its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.calls, self.seen, self.by_call = nn.Linear(4, 2), 0, [], {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.a(x)
        self.seen.append(self.last)
        self.by_call[self.calls] = self.last
        return self.last * self.calls


@BOTH
def test_caches_and_counters_are_put_back(curvature: Any) -> None:
    model = Caching()
    problem = problem_of(model)
    assert_as_plain(problem, batch(), batch() + 1, curvature)
    assert (model.calls, model.seen, model.by_call, hasattr(model, "last")) == (0, [], {}, False)
    model(batch())
    last = model.last
    found_by(problem, curvature)
    assert (model.calls, model.seen, model.by_call) == (1, [last], {1: last})
    assert model.last is last


@BOTH
def test_losses_that_reach_model_and_hyperparameters_by_closure(curvature: Any) -> None:
    """The module itself holds the tensors given, so that it does not matter how a loss got hold of it."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 2))
    given = problem_of(model)
    hparams = given.hparams
    held = Problem(
        model,
        hparams,
        lambda _, __, b: given.train_loss(model, hparams, b),
        lambda _, __, b: given.val_loss(model, hparams, b),
    )
    torch.manual_seed(3)
    expected = found_by(given, curvature)
    torch.manual_seed(3)
    with no_trace(held):
        found = found_by(held, curvature)
    assert torch.equal(found, expected)


@BOTH
def test_cached_parametrizations_are_made_anew(curvature: Any) -> None:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    problem = problem_of(model)
    expected = found_by(problem, curvature)
    with parametrize.cached():
        weight = model[0].weight
        assert torch.equal(found_by(problem, curvature), expected)
        assert model[0].weight is weight
    assert parametrize._cache == {}


@pytest.mark.parametrize(
    "solver",
    [None, Neumann(terms=3), WarmStart(MINRES(terms=3)), WarmStart(CG(terms=3)), WarmStart(Neumann(terms=3))],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:the inner optimizer does not hold")
def test_layers_frozen_and_thawed_between_hypersteps(solver: Any) -> None:
    """What a solver carries over is left where it does not fit: the first hyperstep after a change is as a fresh one."""
    model, x = mlp(), batch()
    problem, method = problem_of(model), Implicit(solver)
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.05), torch.optim.SGD(problem.hparams.parameters(), lr=0.0)
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[x], every=None, hypergradient=method)
    for frozen in ([], [0], [0, 2], [2], []):
        if len(frozen) == 2:
            for layer in (0, 2):
                model[layer].requires_grad_(False)
            continue
        for layer in (0, 2):
            model[layer].requires_grad_(layer not in frozen)
        names = [name for name, _ in model.named_parameters() if int(name[0]) not in frozen]
        optimizer.zero_grad()
        optimizer.loss(x).backward()
        optimizer.step()
        fresh = hoptim.hypergradient(problem, x, x, method)
        record = optimizer.hyperstep(x, x)
        assert list(record.result.solution.value) == list(fresh.solution.value) == names
        torch.testing.assert_close(record.result.grads, fresh.grads, rtol=1e-6, atol=1e-9)


def test_first_part_is_read_and_a_namespace_is_a_batch() -> None:
    """A batch of any class goes to the loss as it is."""
    model, b = nn.GRU(3, 2), SimpleNamespace(x=batch(3, 2, 3))
    problem = problem_of(model, lambda m, b: first(m, b.x))
    found = hoptim.hypergradient(problem, b, b, few()).grads["decay"]
    assert same(found, found_by(problem_of(model, first), x=b.x))


def test_a_wrapper_is_walked_through_as_the_model_inside() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Tanh()})
    seen = Facade(nn.DataParallel(model), model)
    assert (list(seen), len(seen), seen["a"]) == (["a", "b"], 2, model["a"])


def test_models_held_by_torchscript_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(mlp())
    with pytest.raises(TypeError, match="TorchScript"):
        problem_of(scripted)


def test_fully_sharded_models_of_the_first_kind_are_refused() -> None:
    sharded = type("FullyShardedDataParallel", (nn.Linear,), {})
    with pytest.raises(TypeError, match=r"holds a FullyShardedDataParallel.*shard it with .*fully_shard"):
        problem_of(nn.Sequential(sharded(4, 2)))
