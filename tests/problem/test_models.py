"""Layers of every kind: the hypergradient is that of plain autograd on a copy, and leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import Predict, assert_as_plain, called, few, first, flags, no_trace, problem_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from versions import TORCH

import hoptim
from hoptim import Exact, FiniteDifference, Implicit, Unrolled

Kind = tuple[Callable[[], nn.Module], Predict, tuple[int, ...]]


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), *middle, nn.Linear(3, 2))


def convolutions(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 4, 2), norm, nn.Tanh(), nn.Conv1d(4, 1, 2))


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project, self.dropout = nn.Linear(4, 12), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)[:, None].chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout * self.training)


class Tied(nn.Module):
    """One matrix that reads tokens and writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.between, self.write = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)
        self.write.weight = self.read.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.between(self.read((10 * x.abs()).long() % 5)).tanh())


class TwoNames(nn.Module):
    """Modules that have two names, for which torch's functional_call leaves other tensors in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.body = nn.Sequential(self.first, self.norm, nn.Tanh(), self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.body(x)))


class Lora(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(1, columns)), nn.Parameter(torch.randn(rows, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def adapted(*, base: bool) -> nn.Module:
    model = mlp(nn.Tanh()).requires_grad_(base)
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", Lora(*layer.weight.shape))
        layer.parametrizations.weight.original.requires_grad_(base)
    return model


class Renormed(nn.Module):
    """Its forward pass writes into its weight."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.read, self.write = nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 2)
        self.read.weight.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.read((10 * x.abs()).long() % 5).tanh())


class Padded(nn.Module):
    """Packed sequences through an LSTM of two layers with dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, num_layers=2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [3, 2], batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        z.add_(1.0).mul_(2.0)
        z[:, 0] *= z[:, 1].clone()
        return self.b(z.sigmoid_())


class Buffers(nn.Module):
    """Whole, complex and boolean numbers among the buffers, all written into."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)
        self.register_buffer("turn", torch.tensor([0.6 + 0.8j]))
        self.register_buffer("count", torch.tensor(2))
        self.register_buffer("on", torch.tensor([True, False]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.turn *= self.turn
        self.on.logical_not_()
        return self.a(x) * self.turn.real * self.count + self.on


class Named(nn.Module):
    """Names with dots, and names that a module has for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"weight": nn.Linear(4, 3), "model": nn.ModuleDict({"hparams": nn.Linear(3, 2)})})
        self.scales = nn.ParameterDict({"loss": torch.ones(3), "decay": torch.ones(())})
        self.shifts = nn.ParameterList([torch.zeros(3), torch.ones(3)])

    def forward(self, x: Tensor) -> Tensor:
        z = (self.layers["weight"](x) * self.scales["loss"] + self.shifts[1]).tanh()
        return self.layers["model"]["hparams"](z) * self.scales["decay"]


def attending(model: Any, x: Tensor) -> Tensor:
    return model(x, x, x)[0]


def checkpointed(reentrant: bool) -> Predict:
    def predict(model: Any, x: Tensor) -> Tensor:
        return model[2](checkpoint(model[1], model[0](x), use_reentrant=reentrant))

    return predict


def normed(layer: nn.Module, **options: Any) -> nn.Module:
    return parametrizations.weight_norm(layer, **options)


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, **options)


KINDS: dict[str, Kind] = {
    "dropout": (lambda: mlp(nn.Tanh(), nn.Dropout(0.5)), called, (6, 4)),
    "alpha dropout": (lambda: mlp(nn.SELU(), nn.AlphaDropout(0.3)), called, (6, 4)),
    "batch norm": (lambda: mlp(nn.BatchNorm1d(3), nn.Tanh()), called, (6, 4)),
    "batch norm in eval mode": (lambda: mlp(nn.BatchNorm1d(3), nn.Tanh()).eval(), called, (6, 4)),
    "batch norm, momentum=None": (lambda: mlp(nn.BatchNorm1d(3, momentum=None)), called, (6, 4)),
    "batch norm, affine=False": (lambda: mlp(nn.BatchNorm1d(3, affine=False)), called, (6, 4)),
    "batch norm, no running stats": (lambda: mlp(nn.BatchNorm1d(3, track_running_stats=False)), called, (6, 4)),
    "sync batch norm, one process": (lambda: mlp(nn.SyncBatchNorm(3), nn.Tanh()), called, (6, 4)),
    "group norm": (lambda: convolutions(nn.GroupNorm(2, 4)), called, (2, 2, 5)),
    "instance norm": (lambda: convolutions(nn.InstanceNorm1d(4, affine=True)), called, (2, 2, 5)),
    "instance norm, running stats": (
        lambda: convolutions(nn.InstanceNorm1d(4, track_running_stats=True)),
        called,
        (2, 2, 5),
    ),
    "layer norm": (lambda: mlp(nn.LayerNorm(3), nn.GELU()), called, (6, 4)),
    "rms norm": (lambda: mlp(nn.RMSNorm(3), nn.SiLU()), called, (6, 4)),
    "LSTM": (lambda: nn.LSTM(3, 2, batch_first=True), first, (3, 4, 3)),
    "LSTM, projected": (lambda: nn.LSTM(2, 2, proj_size=1), first, (3, 2, 2)),
    "LSTM, packed, dropout": (Padded, called, (2, 3, 3)),
    "LSTM, two layers, both ways": (lambda: nn.LSTM(2, 1, num_layers=2, bidirectional=True), first, (3, 2, 2)),
    "GRU, two layers, both ways": (lambda: nn.GRU(2, 1, num_layers=2, bidirectional=True), first, (3, 2, 2)),
    "RNN": (lambda: nn.RNN(3, 2), first, (3, 2, 3)),
    "LSTM cell": (lambda: nn.LSTMCell(3, 2), first, (3, 3)),
    "attention": (Attention, called, (2, 3, 4)),
    "attention, dropout": (lambda: Attention(0.3), called, (2, 3, 4)),
    "multi-head attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), attending, (2, 3, 4)),
    "transformer layer": (lambda: encoder(dropout=0.3), called, (2, 3, 4)),
    "transformer layer in eval mode": (lambda: encoder().eval(), called, (2, 3, 4)),
    "tied": (Tied, called, (3, 2)),
    "two names": (TwoNames, called, (6, 4)),
    "frozen backbone": (
        lambda: nn.Sequential(mlp(nn.BatchNorm1d(3)).requires_grad_(False), nn.Linear(2, 2)),
        called,
        (6, 4),
    ),
    "adapters": (lambda: adapted(base=False), called, (6, 4)),
    "adapters and base": (lambda: adapted(base=True), called, (6, 4)),
    "weight norm": (
        lambda: nn.Sequential(normed(nn.Linear(4, 3)), nn.Tanh(), normed(nn.Linear(3, 2), dim=1)),
        called,
        (6, 4),
    ),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh()), called, (6, 3)),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh()), called, (6, 4)),
    "max norm": (lambda: Renormed(False), called, (3, 2)),
    "max norm, frozen": (lambda: Renormed(True), called, (3, 2)),
    "in place": (InPlace, called, (6, 4)),
    "buffers": (Buffers, called, (6, 4)),
    "names": (Named, called, (6, 4)),
    "checkpoint": (lambda: mlp(nn.Sequential(nn.Tanh(), nn.Dropout(0.3))), checkpointed(False), (6, 4)),
}
EXACT_ONLY = {"spectral norm", "max norm"}  # what runs under no_grad() moves with the weights, and differences see it


def model_and_batches(name: str) -> tuple[nn.Module, Predict, Tensor, Tensor]:
    make, predict, shape = KINDS[name]
    return make(), predict, torch.randn(shape), torch.randn(shape)


@pytest.mark.filterwarnings("ignore:val_loss runs .* in training mode")
@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference()], ids=["exact", "differences"])
@pytest.mark.parametrize("evaluated", [True, False], ids=["", "validated in train mode"])
@pytest.mark.parametrize("name", KINDS)
def test_hypergradient_is_that_of_plain_autograd(name: str, evaluated: bool, curvature: Any) -> None:
    model, predict, train, val = model_and_batches(name)
    if isinstance(curvature, Exact) or (evaluated and name not in EXACT_ONLY):
        weights = [p for p in model.parameters() if p.requires_grad]
        dense = sum(p.numel() for p in weights) < 60
        assert_as_plain(problem_of(model, predict, evaluated=evaluated), train, val, curvature, dense=dense)


@pytest.mark.parametrize(
    "name", ["batch norm", "group norm", "LSTM, packed, dropout", "transformer layer", "weight norm", "checkpoint"]
)
def test_several_losses_at_once_are_as_one_by_one(name: str) -> None:
    model, predict, train, val = model_and_batches(name)
    together = hoptim.hypergradient(problem_of(model, predict, losses=2), train, val, few()).grads["decay"]
    for number, row in enumerate(together):
        problem = problem_of(model, predict, losses=2)
        whole = problem.val_loss
        problem.val_loss = lambda m, h, b, whole=whole, number=number: whole(m, h, b)[number]
        alone = hoptim.hypergradient(problem, train, val, few()).grads["decay"]
        torch.testing.assert_close(row, alone, rtol=1e-9, atol=1e-12)


def test_group_norm_at_once_is_never_torchs_wrong_answer() -> None:
    """One group and one example: there torch's rule for several vectors gave an answer before 2.14, and a wrong one."""
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.GroupNorm(1, 2))
    nn.init.normal_(model[1].weight)
    problem, x = problem_of(model, losses=2), torch.randn(1, 2, 2)
    weights = list(model.parameters())
    loss = problem.train_loss(model, problem.hparams, x)
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    torchs = torch.autograd.grad(slopes, weights, [torch.ones(2, *p.shape) for p in weights], True, is_grads_batched=True)[0]
    right = torch.autograd.grad(slopes, weights, [torch.ones(p.shape) for p in weights])[0]
    assert torch.allclose(torchs[0], right) == (TORCH >= (2, 14))  # once no older torch has it wrong, drop the way round
    together = hoptim.hypergradient(problem, x, x, few()).grads["decay"]
    alone = hoptim.hypergradient(problem_of(model), x, x, few()).grads["decay"]
    torch.testing.assert_close(together[0], alone, rtol=1e-9, atol=1e-12)


OLD_AND_NEW = {
    "weight norm": (nn.utils.weight_norm, parametrizations.weight_norm),
    "spectral norm": (nn.utils.spectral_norm, parametrizations.spectral_norm),
}


@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference()], ids=["exact", "differences"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", OLD_AND_NEW)
def test_old_norms_made_by_hooks_leave_the_weight_they_made(kind: str, curvature: Any) -> None:
    """They keep the product as a plain attribute, of which torch makes no copy: the new form is the reference."""
    old, new = OLD_AND_NEW[kind]
    ours = mlp(nn.Tanh()).eval()
    theirs = copy.deepcopy(ours)
    old(ours[0])
    new(theirs[0])
    for (_, own), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):  # the singular vectors
        other.copy_(own)
    x = torch.randn(6, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    made, problem = ours[0].weight, problem_of(ours)
    with no_trace(problem):
        found = hoptim.hypergradient(problem, x, x, few(curvature))
    assert ours[0].weight is made
    assert_as_plain(problem_of(theirs), x, x, curvature)
    expected = hoptim.hypergradient(problem_of(theirs), x, x, few(curvature))
    torch.testing.assert_close(found.grads["decay"], expected.grads["decay"], rtol=1e-6, atol=1e-9)


def test_torchs_own_weight_norm_in_a_loss_is_refused() -> None:
    """Its second derivative lacks a term; the module is made of other operations, a call by hand can't be."""
    model = nn.ParameterDict({"v": torch.randn(3, 4), "g": torch.rand(3, 1)})
    problem = problem_of(model, lambda m, x: F.linear(x, torch._weight_norm(m["v"], m["g"], 0)))
    x = torch.randn(6, 4)
    with pytest.raises(TypeError, match=r"torch\._weight_norm lacks a term.*parametrizations\.weight_norm"):
        hoptim.hypergradient(problem, x, x)


# Activation checkpointing of a layer among writes: it runs again, and has to find what it found when it ran first


class Written(nn.Module):
    """Reads a buffer and an attribute in its last part, among writes to them before it, in it and after it."""

    def __init__(self, checkpoints: Any, norm: Any = lambda layer: layer) -> None:
        super().__init__()
        self.first, self.last, self.count, self.checkpoints = nn.Linear(4, 3), norm(nn.Linear(3, 2)), 1, checkpoints
        self.register_buffer("scale", torch.ones(3))

    def part(self, z: Tensor) -> Tensor:
        self.count += 1
        with torch.no_grad():
            self.scale.mul_(0.5).add_(0.5 * z.abs().mean(0))
        return self.last((z / self.scale.clone() * self.count).tanh())

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        self.count, self.scale = self.count + 1, 0.5 * self.scale
        z = self.part(z) if self.checkpoints is None else checkpoint(self.part, z, **self.checkpoints)
        self.count, self.scale = self.count + 1, 0.5 * self.scale
        return z


class Looked(nn.Module):
    """An embedding whose forward pass writes to its weight, which also writes tokens."""

    def __init__(self, checkpoints: Any) -> None:
        super().__init__()
        self.read, self.between, self.checkpoints = nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 2), checkpoints

    def part(self, tokens: Tensor) -> Tensor:
        return self.between((self.read(tokens) @ self.read.weight.T @ self.read.weight).tanh())

    def forward(self, x: Tensor) -> Tensor:
        tokens = (10 * x.abs()).long() % 5
        return self.part(tokens) if self.checkpoints is None else checkpoint(self.part, tokens, **self.checkpoints)


AMONG_WRITES: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "a scale": (Written, (6, 4)),
    "spectral norm": (lambda checkpoints: Written(checkpoints, parametrizations.spectral_norm), (6, 4)),
    "spectral norm, old": (lambda checkpoints: Written(checkpoints, nn.utils.spectral_norm), (6, 4)),
    "max norm": (Looked, (6,)),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [few(), Implicit(curvature=FiniteDifference()), Unrolled(3)], ids=repr)
@pytest.mark.parametrize("name", AMONG_WRITES)
def test_a_layer_that_a_checkpoint_runs_again_finds_what_it_found_before(name: str, method: Any, reentrant: bool) -> None:
    make, shape = AMONG_WRITES[name]
    train, val, found = torch.rand(shape), torch.rand(shape), []
    for checkpoints in (None, {"use_reentrant": reentrant}):
        torch.manual_seed(2)
        model = make(checkpoints)
        problem, inner = problem_of(model), torch.optim.SGD(model.parameters(), lr=0.1)
        with no_trace(problem):
            found.append(hoptim.hypergradient(problem, train, val, method, inner=inner))
    plain, checkpointed = found
    assert torch.equal(checkpointed.grads["decay"], plain.grads["decay"])
    assert torch.equal(checkpointed.gradient_norm, plain.gradient_norm)


# Training goes on


TRAINED = [
    "LSTM, packed, dropout",
    "GRU, two layers, both ways",
    "transformer layer",
    "batch norm",
    "dropout",
    "weight norm",
]


@pytest.mark.parametrize("method", [Implicit(), Implicit(curvature=FiniteDifference()), Unrolled(1)], ids=repr)
@pytest.mark.parametrize("name", TRAINED)
def test_training_goes_on_to_the_same_bits(name: str, method: Any) -> None:
    """A hyperstep after each step, which moves nothing, and the same training without hoptim: weights, buffers, masks."""
    model, predict, train, val = model_and_batches(name)
    other = copy.deepcopy(model)
    problem, reference = problem_of(model, predict), problem_of(other, predict)
    inner, plain = (torch.optim.Adam(m.parameters(), lr=0.05) for m in (model, other))
    outer = torch.optim.SGD(problem.hparams.parameters(), lr=0.0)
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[val], every=1, hypergradient=method)
    states = []
    for m, step, loss in (
        (model, optimizer, optimizer.loss),
        (other, plain, lambda b: reference.train_loss(other, reference.hparams, b)),
    ):
        torch.manual_seed(5)
        for _ in range(3):
            step.zero_grad()
            loss(train).backward()
            step.step()
        states.append([*m.state_dict().values(), predict(m, train), torch.get_rng_state()])
    assert optimizer.hyper_steps == 3
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", ["LSTM, packed, dropout", "transformer layer", "batch norm"])
def test_unrolled_steps_of_any_model(name: str) -> None:
    """One step of SGD ahead, w⁺ = w − lr·∇L_T, by hand on a copy: its masks first, the validation loss at w⁺."""
    model, predict, train, val = model_and_batches(name)
    problem, lr = problem_of(model, predict), 0.1
    torch.manual_seed(3)
    after, hparams = copy.deepcopy((model, problem.hparams))
    weights, leaf = list(after.parameters()), hparams["decay"]
    F_ = torch.autograd.grad(problem.train_loss(after, {"decay": leaf}, train), weights, create_graph=True)
    moved = copy.deepcopy(after)  # with the running statistics that the step has left
    with torch.no_grad():
        for p, slope in zip(moved.parameters(), F_, strict=True):
            p -= lr * slope
    loss = problem.val_loss(moved, {"decay": leaf}, val)
    *g, direct = torch.autograd.grad(loss, [*moved.parameters(), leaf])
    expected = direct - lr * torch.autograd.grad(F_, leaf, g)[0]
    torch.manual_seed(3)
    with no_trace(problem):
        inner = torch.optim.SGD(model.parameters(), lr=lr)
        result = hoptim.hypergradient(problem, train, val, Unrolled(1), inner=inner)
    torch.testing.assert_close(result.grads["decay"], expected, rtol=1e-10, atol=1e-12)


# Kernels


def test_fast_path_and_fused_kernels_are_the_users_again_afterwards() -> None:
    model, _, train, val = model_and_batches("transformer layer in eval mode")
    with torch.no_grad():
        before = model(train)
    hoptim.hypergradient(problem_of(model), train, val)
    with torch.no_grad():
        assert torch.equal(model(train), before)


@pytest.mark.parametrize("users", [True, False])
@pytest.mark.parametrize(("name", "inside"), [("LSTM", False), ("dropout", None)])
def test_cudnn_is_off_inside_where_there_is_an_rnn(name: str, inside: bool | None, users: bool) -> None:
    model, predict, train, val = model_and_batches(name)
    problem, seen = problem_of(model, predict), []
    for which in ("train_loss", "val_loss"):
        loss = getattr(problem, which)
        setattr(problem, which, lambda m, h, b, loss=loss: seen.append(torch.backends.cudnn.enabled) or loss(m, h, b))
    enabled = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = users
        before = flags()
        hoptim.hypergradient(problem, train, val)
        assert flags() == before
        assert seen == [users if inside is None else inside] * 2
        problem.loss(train)
        assert seen[-1] is users
    finally:
        torch.backends.cudnn.enabled = enabled
