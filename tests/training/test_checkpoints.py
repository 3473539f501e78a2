"""What is saved can be read back, by nothing but tensors and plain values; what is damaged or another's is refused whole."""

from __future__ import annotations

import copy
import io
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import INNERS, advance, noisy_run, same
from jobs import result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import hoptim
from hoptim import CG, GMRES, MINRES, SOBA, Chebyshev, Implicit, Neumann, Nystrom, Unrolled, WarmStart
from hoptim.training.checkpoint import REQUIRED, VERSION
from hoptim.training.files import read_whole


def packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


# Everything that is written is tensors and plain values


CARRYING: dict[str, Callable[[], Any]] = {
    "direction": lambda: Implicit(Neumann(terms=3)),
    "interval": lambda: Implicit(Chebyshev(terms=3), damping=1.0),
    "nystrom": lambda: Implicit(Nystrom(rank=2)),
    "solution": lambda: Implicit(WarmStart(MINRES(terms=2)), damping=1.0),
    "solution, before its step": lambda: Implicit(SOBA(step_size=0.1)),
    "solution and direction": lambda: Implicit(WarmStart(Neumann(terms=2))),
    "solution, update": lambda: Implicit(WarmStart(GMRES(terms=2)), condition=hoptim.Update()),
    "trajectory": lambda: Unrolled(3),
}
BATCHES: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda pair: pair,
    "list": list,
    "dict": lambda pair: {"input": {"x": pair[0]}, "y": pair[1], "name": "b", "count": 3, "none": None},
}


def as_tuple(batch: Any) -> Any:
    return (batch["input"]["x"], batch["y"]) if isinstance(batch, dict) else tuple(batch)


def run_on(batch: Callable[[Any], Any], seed: int = 0, method: Any = None) -> Any:
    run = noisy_run("adam", every=3, seed=seed, hypergradient=method or Unrolled(3))
    run.batches = [batch(pair) for pair in run.batches]
    for name in ("train_loss", "val_loss"):
        loss = getattr(run.problem, name)
        setattr(run.problem, name, lambda m, h, b, loss=loss: loss(m, h, as_tuple(b)))
    return run


@pytest.mark.filterwarnings("ignore:hyperstep")
@pytest.mark.parametrize(
    ("name", "kind"), [(name, "tuple") for name in CARRYING] + [("trajectory", "list"), ("trajectory", "dict")]
)
def test_state_is_plain_and_goes_on_to_the_same_bits(name: str, kind: str) -> None:
    whole = run_on(BATCHES[kind], method=CARRYING[name]())
    advance(whole, 0, 7)
    first = run_on(BATCHES[kind], method=CARRYING[name]())
    advance(first, 0, 5)  # in the middle of what Unrolled keeps
    saved = packed([dict(first.model.state_dict()), first.optimizer.state_dict(), torch.get_rng_state()])
    kept = first.optimizer.state_dict()["hoptim"]
    assert kept["trajectory"] if name == "trajectory" else kept["solver_state"] or name == "nystrom"

    second = run_on(BATCHES[kind], seed=7, method=CARRYING[name]())
    model, state, generator = unpacked(saved)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(state)
    torch.set_rng_state(generator)
    advance(second, 5, 7)
    assert same(dict(second.model.state_dict()), dict(whole.model.state_dict()))
    assert same(second.optimizer.state_dict(), whole.optimizer.state_dict())


@dataclass
class Batch:
    x: Tensor
    y: Tensor


def test_a_batch_of_a_class_of_ones_own_is_saved_between_hypersteps_and_torch_asks_for_the_class() -> None:
    """What Unrolled keeps is the user's batches, as they are; right after a hyperstep there are none."""
    run = noisy_run("adam", every=3, hypergradient=Unrolled(3))
    run.batches = [Batch(*pair) for pair in run.batches]
    train_loss = run.problem.train_loss
    run.problem.train_loss = lambda m, h, b: train_loss(m, h, (b.x, b.y))
    advance(run, 0, 3)
    unpacked(packed(run.optimizer.state_dict()))
    advance(run, 3, 5)
    saved = packed(run.optimizer.state_dict())
    with pytest.raises(Exception, match=r"add_safe_globals\(\[.*Batch\]\)"):
        unpacked(saved)
    with torch.serialization.safe_globals([Batch]):
        kept = unpacked(saved)["hoptim"]["trajectory"]["steps"]
    seen = [one[0] for step in kept for one in step["seen"]]
    assert [type(batch) for batch in seen] == [Batch, Batch]
    assert torch.equal(seen[1].x, run.batches[4].x)


# Damaged


def broken(change: Callable[[dict[str, Any]], Any], optimizer: Any) -> dict[str, Any]:
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    return state


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Replace what is at the path by its last member."""
    *way, last, value = path

    def change(state: dict[str, Any]) -> None:
        for key in way:
            state = state[key]
        state[last] = value

    return change


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{f"{name} is missing": (lambda s, name=name: s["hoptim"].pop(name)) for name in REQUIRED},
    **{f"{name} is None": put("hoptim", name, None) for name in ("outer", "hparams", "solver_state", "val_batches")},
    "no groups": lambda s: s.pop("param_groups"),
    "no state": lambda s: s.pop("state"),
    "outer without groups": lambda s: s["hoptim"]["outer"].pop("param_groups"),
    "no position": lambda s: s["hoptim"]["val_batches"].pop("position"),
    "no generator": lambda s: s["hoptim"]["val_batches"].update(begun={}),
    "generator of another size": lambda s: s["hoptim"]["val_batches"].update(begun={"": torch.zeros(3, dtype=torch.uint8)}),
    "hyperparameter is text": put("hoptim", "hparams", "decay", "0.1"),
    "trajectory without its begins": lambda s: s["hoptim"]["trajectory"].pop("begins"),
    "trajectory without steps": lambda s: s["hoptim"]["trajectory"].pop("steps"),
}


def begun(seed: int, steps: int) -> Any:
    run = noisy_run("adam", every=3, hypergradient=Unrolled(3), seed=seed)
    torch.manual_seed(4)
    advance(run, 0, steps)
    return run


def gone_on(run: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    advance(run, 4, 7)
    return run.optimizer.state_dict()


@cache
def state_of_another() -> dict[str, Any]:
    return begun(seed=1, steps=5).optimizer.state_dict()


@cache
def undisturbed() -> dict[str, Any]:
    return gone_on(begun(seed=0, steps=4))


@pytest.mark.filterwarnings("ignore:hyperstep")
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(name: str) -> None:
    damaged = copy.deepcopy(state_of_another())
    DAMAGES[name](damaged)
    run = begun(seed=0, steps=4)
    before = copy.deepcopy([run.optimizer.state_dict(), dict(run.model.state_dict()), torch.get_rng_state()])
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, RuntimeError)) as caught:
        run.optimizer.load_state_dict(damaged)
    if "is missing" in name:
        assert f"lacks ['{name.split()[0]}']: it is damaged; load an earlier checkpoint" in str(caught.value)
    assert same([run.optimizer.state_dict(), dict(run.model.state_dict()), torch.get_rng_state()], before)
    assert same(gone_on(run), undisturbed())


def test_a_load_copies_no_state_of_the_inner_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as two models, for Adam: only the hyperparameters, into which torch writes, are copied."""
    run = noisy_run("adam", every=3, hypergradient=Unrolled(3))
    advance(run, 0, 5)
    state, copies = run.optimizer.state_dict(), []
    original = Tensor.__deepcopy__
    monkeypatch.setattr(Tensor, "__deepcopy__", lambda self, memo: copies.append(self.shape) or original(self, memo))
    run.optimizer.load_state_dict(state)
    assert copies == [run.hparams["decay"].shape]


# Another model's


def layered(sizes: tuple[int, ...], hparams: dict[str, Tensor] | None = None, names: Any = None) -> Any:
    """Linear layers of these sizes with a hyperparameter or more, two steps old."""
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*layers) if names is None else nn.ModuleDict(dict(zip(names, layers, strict=True)))
    values = hoptim.HyperParameters(hparams or {"decay": torch.tensor(0.1)})

    def train_loss(m: Any, h: Any, b: Any) -> Tensor:
        penalty = sum(p.square().sum() for p in m.parameters())
        return sum(v.square().sum() for v in dict(h).values()) * penalty + penalty

    problem = hoptim.Problem(model, values, train_loss, lambda m, h, b: sum((p - 1).square().sum() for p in m.parameters()))
    optimizer = hoptim.BilevelOptimizer(
        torch.optim.Adam(model.parameters()), torch.optim.Adam(values.parameters()), problem, val_batches=[0], every=1,
        hypergradient=Implicit(WarmStart(CG(terms=2))),
    )  # fmt: skip
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.loss(0).backward()
        optimizer.step()
    return optimizer


PAIRS: dict[str, tuple[Any, Any, list[str]]] = {
    "wider": (
        lambda: layered((2, 3, 1)),
        lambda: layered((2, 4, 1)),
        ["0.weight (3, 2) there is 0.weight (4, 2) here", "0.bias (3,)", "1.weight (1, 3) there is 1.weight (1, 4) here"],
    ),
    "deeper": (
        lambda: layered((2, 2)),
        lambda: layered((2, 2, 2)),
        ["nothing there is 1.weight (2, 2) here", "1.bias (2,)"],
    ),
    "swapped": (
        lambda: layered((2, 2, 2), names=("a", "b")),
        lambda: layered((2, 2, 2), names=("b", "a")),
        ["a.weight (2, 2) there is b.weight (2, 2) here", "b.bias (2,) there is a.bias (2,) here"],
    ),
    "hyperparameter of another shape": (
        lambda: layered((2, 2), {"decay": torch.ones(2)}),
        lambda: layered((2, 2), {"decay": torch.ones(3)}),
        ["size mismatch for decay", "[2]", "[3]"],
    ),
    "hyperparameter of another name": (
        lambda: layered((2, 2), {"layer.decay": torch.ones(2)}),
        lambda: layered((2, 2), {"rate": torch.ones(2)}),
        ["Missing", '"rate"', "Unexpected", '"layer.decay"'],
    ),
}
SWAPPED = {"deeper": ["1.weight (2, 2) there is nothing here"], "wider": ["0.weight (4, 2) there is 0.weight (3, 2) here"]}


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_state_of_another_model_is_refused_by_names_and_shapes_and_changes_nothing(name: str, back: bool) -> None:
    first, second, words = PAIRS[name]
    saved, live = (second(), first()) if back else (first(), second())
    words = words if not back else SWAPPED.get(name, [])
    before = copy.deepcopy(live.state_dict())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        live.load_state_dict(unpacked(packed(saved.state_dict())))
    assert [word for word in words if word not in str(caught.value)] == []
    assert same(live.state_dict(), before)


def test_a_long_list_of_differences_is_cut() -> None:
    with pytest.raises(ValueError, match=r"0\.weight .*; and 7 more\. Build the model as it was"):
        layered((3, 3, 3, 3, 3, 3, 3)).load_state_dict(layered((2, 2, 2, 2, 2, 2, 2)).state_dict())


def test_weights_that_were_only_renamed_are_loaded_on_request() -> None:
    saved, live = layered((2, 2), names=("old",)).state_dict(), layered((2, 2), names=("new",))
    with pytest.raises(ValueError, match=r"old\.weight .*new\.weight .*drop state_dict\['hoptim'\]\['weights'\]"):
        live.load_state_dict(saved)
    del saved["hoptim"]["weights"]
    live.load_state_dict(saved)
    assert same(live.state_dict()["hoptim"]["solver_state"], saved["hoptim"]["solver_state"])
    assert same(live.inner.state_dict()["state"], saved["state"])
    assert live.hyperstep().moved


@pytest.mark.filterwarnings("ignore:hyperstep")
def test_what_is_carried_for_another_number_of_weights_is_ignored() -> None:
    first, second = (noisy_run("adamw", every=1, seed=seed) for seed in (0, 7))
    advance(first, 0, 2)
    state = unpacked(packed(first.optimizer.state_dict()))
    state["hoptim"]["solver_state"]["direction"] = torch.ones(2)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(state)
    for run in (first, second):
        torch.manual_seed(5)
        advance(run, 2, 3)
    products = [run.optimizer.record.result.solution.products for run in (first, second)]
    assert products == [2 + 3, 10 + 3]  # for the bound: two from the carried direction, ten without one


# As it is written, and newer


def written_by_hand() -> dict[str, Any]:
    """The state of :func:`quadratic` after one inner step and one hyperstep."""
    group = {"lr": 0.1, "momentum": 0.5, "dampening": 0, "weight_decay": 0, "nesterov": False, "params": [0]}
    group |= {"maximize": False, "foreach": None, "differentiable": False, "fused": None}
    added = {
        "version": 1,
        "weights": [("w", [2])],
        "outer": {"state": {0: {"momentum_buffer": torch.tensor([2.8, 2.8])}}, "param_groups": [dict(group)]},
        "hparams": {"a": torch.tensor([0.72, 0.72])},
        "inner_steps": 1,
        "hyper_steps": 1,
        "solver_state": {"direction": torch.tensor([0.6, 0.8])},
        "solver_weights": ["w"],
        "last_gradient": {"a": torch.tensor([2.8, 2.8])},
        "norms": {},
        "trajectory": None,
        "val_batches": {"position": 0, "begun": {}, "now": {}},
        "train_batches": None,
    }
    return {"state": {0: {"momentum_buffer": torch.tensor([2.0, 2.0])}}, "param_groups": [dict(group)], "hoptim": added}


def quadratic() -> hoptim.BilevelOptimizer:
    """L_T = ‖w − a‖²/2 and L_V = ‖w‖²/2, so that the hypergradient is w."""
    model, hparams = nn.ParameterDict({"w": torch.full((2,), 2.8)}), hoptim.HyperParameters({"a": torch.ones(2)})
    problem = hoptim.Problem(
        model, hparams, lambda m, h, b: 0.5 * (m["w"] - h["a"]).square().sum(), lambda m, h, b: 0.5 * m["w"].square().sum()
    )
    inner, outer = (torch.optim.SGD(module.parameters(), lr=0.7) for module in (model, hparams))
    return hoptim.BilevelOptimizer(
        inner, outer, problem, val_batches=["val"], every=1, hypergradient=Implicit(Neumann(terms=2))
    )


def test_a_state_written_by_hand_goes_on() -> None:
    optimizer = quadratic()
    assert optimizer.state_dict()["hoptim"].keys() == written_by_hand()["hoptim"].keys()
    optimizer.load_state_dict(written_by_hand())
    assert same(optimizer.state_dict()["hoptim"]["solver_state"], {"direction": torch.tensor([0.6, 0.8])})
    optimizer.loss(0).backward()
    optimizer.step()
    w = 2.8 - 0.1 * (0.5 * 2.0 + (2.8 - 0.72))
    a = 0.72 - 0.1 * (0.5 * 2.8 + w)
    torch.testing.assert_close(optimizer.problem.model["w"].detach(), torch.full((2,), w))
    torch.testing.assert_close(optimizer.problem.hparams["a"].detach(), torch.full((2,), a))
    assert (optimizer.inner_steps, optimizer.hyper_steps) == (2, 2)
    assert optimizer.record.cosine_to_last == pytest.approx(1.0)
    now = optimizer.state_dict()
    assert now["hoptim"]["version"] == VERSION
    quadratic().load_state_dict(unpacked(packed(now)))
    del now["hoptim"]["norms"], now["hoptim"]["solver_weights"]  # which an earlier version has not
    quadratic().load_state_dict(now)


def test_a_state_of_a_newer_version_is_refused() -> None:
    with pytest.raises(ValueError, match=f"of version {VERSION + 1}, newer than {VERSION}: upgrade hoptim"):
        quadratic().load_state_dict(broken(put("hoptim", "version", VERSION + 1), quadratic()))


# torch.distributed.checkpoint, safetensors


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:hyperstep", "ignore:torch.distributed")
@pytest.mark.parametrize("inner", [*INNERS, "plain"])
def test_distributed_checkpoint_with_the_inner_optimizer_and_the_added_entry_beside(
    tmp_path: Path, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The helper takes one step with lr 0 where there is no state: on ``inner`` it counts for nothing."""
    monkeypatch.setitem(INNERS, "plain", lambda p: torch.optim.SGD(p, lr=0.05))
    whole, first, second = (noisy_run(inner, every=3, hypergradient=Unrolled(3), seed=seed) for seed in (0, 0, 7))
    torch.manual_seed(0)
    advance(whole, 0, 7)

    torch.manual_seed(0)
    advance(first, 0, 5)
    first.optimizer.zero_grad()
    model, optim = get_state_dict(first.model, first.optimizer.inner)
    beside = packed([first.optimizer.state_dict()["hoptim"], torch.get_rng_state()])
    dcp.save({"model": model, "optim": optim, "hoptim": beside}, checkpoint_id=tmp_path)
    assert (first.optimizer.inner_steps, first.optimizer.hyper_steps) == (5, 1)

    model, optim = get_state_dict(second.model, second.optimizer.inner)
    state = {"model": model, "optim": optim, "hoptim": b""}
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(second.model, second.optimizer.inner, model_state_dict=state["model"], optim_state_dict=state["optim"])
    added, generator = unpacked(state["hoptim"])
    second.optimizer.load_state_dict({**second.optimizer.inner.state_dict(), "hoptim": added})
    torch.set_rng_state(generator)
    for run in (first, second):
        torch.set_rng_state(generator)
        advance(run, 5, 7)
        assert same(dict(run.model.state_dict()), dict(whole.model.state_dict()))
        assert same(run.optimizer.state_dict()["hoptim"], whole.optimizer.state_dict()["hoptim"])


def test_the_helper_on_the_bilevel_optimizer_itself_drops_the_entry_and_loading_says_so() -> None:
    run = noisy_run("adam", every=3)
    advance(run, 0, 4)
    model, optim = get_state_dict(run.model, run.optimizer)
    assert "hoptim" not in optim
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.warns(UserWarning, match=r"take hoptim\.save_checkpoint and load_checkpoint"):
        set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optim)
    assert same(run.optimizer.state_dict(), before)


@pytest.mark.parametrize("constraint", [None, torch.distributions.constraints.positive])
def test_hyperparameters_go_through_safetensors(tmp_path: Path, constraint: Any) -> None:
    values = {
        "0.weight": torch.rand(3, 2) + 0.1,
        "rate": torch.tensor(0.5),
        "a.b.c": torch.ones(0),
        "10%": torch.ones(1),
    }
    first, second, third = (
        hoptim.HyperParameters(start, dict.fromkeys(values, constraint) if constraint else None)
        for start in (values, *[{name: torch.ones_like(value) for name, value in values.items()}] * 2)
    )
    save_file(first.state_dict(), tmp_path / "leaves.safetensors")
    second.load_state_dict(load_file(tmp_path / "leaves.safetensors"))
    save_file({name: first[name].detach() for name in first}, tmp_path / "values.safetensors")
    for name, value in load_file(tmp_path / "values.safetensors").items():
        third[name] = value
    assert set(load_file(tmp_path / "values.safetensors")) == set(values)
    for name, value in values.items():
        assert torch.equal(second[name], first[name])
        torch.testing.assert_close(third[name].detach(), value)


# What scripts/train.py writes


SHORT = ("outer_steps=6", "inner_steps=4", "task.hidden=8", "checkpoint_every=3", "plots=false", "hoptim/tracker=[]")


def iris(folder: Path, *overrides: str, check: bool = True) -> Any:
    """A short run of scripts/train.py in this folder."""
    return jobs.train(f"hydra.run.dir={folder}", *SHORT, *overrides, check=check)


SETTINGS: dict[str, list[str]] = {
    "warm start": ["hoptim/solver=warm_start"],
    "neumann, adam": ["hoptim/solver=neumann", "inner=adam"],
    "unrolled": ["hoptim/method=unrolled", "hoptim.method.steps=4"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_all_files_of_a_run_are_read_without_code(tmp_path: Path, name: str) -> None:
    iris(tmp_path, *SETTINGS[name])
    assert {path.name for path in tmp_path.iterdir()} == {
        ".hydra", "train.log", "checkpoint.pt", "config.yaml", "hyperparameters.safetensors", "metrics.jsonl", "result.json"
    }  # fmt: skip
    saved = read_whole(tmp_path / "checkpoint.pt")
    (own,) = saved["ranks"]
    assert (saved["outer_step"], own["optimizer"]["hoptim"]["inner_steps"]) == (6, 24)
    values = load_file(tmp_path / "hyperparameters.safetensors")
    assert {name: value.numel() for name, value in values.items()} == {"0.weight": 32, "3.weight": 64, "6.weight": 24}
    for text in ("config.yaml", "metrics.jsonl", "result.json"):
        (tmp_path / text).read_text()


def halved(data: bytearray) -> bytes:
    return bytes(data[: len(data) // 2])


def flipped(at: float) -> Callable[[bytearray], bytes]:
    """One bit turned over at that share of the file: of a tensor's numbers, which torch.load itself would let pass."""

    def turned(data: bytearray) -> bytes:
        data[int(at * len(data))] ^= 0x10
        return bytes(data)

    return turned


SPOILED: dict[str, Callable[[bytearray], bytes]] = {
    "truncated": halved,
    "a wrong bit": flipped(0.5),
    "another program's": lambda data: packed({"epoch": 1}),
    "code": lambda data: packed({"fingerprint": "", "outer_step": 3, "model": nn.Linear(1, 1)}),
}
UNREAD: dict[str, Callable[[bytearray], bytes]] = {  # what a run would be told in the same way
    "empty": lambda data: b"",
    "one byte short": lambda data: bytes(data[:-1]),
    "another wrong bit": flipped(0.8),
    "another kind of file": lambda data: b'{"outer_step": 3}',
    "a file of nothing": lambda data: bytes(len(data)),
}


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    iris(folder)
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """The folder of a finished run, one's own."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_checkpoint_is_named_with_the_remedy_and_nothing_is_touched(trained: Path, name: str) -> None:
    path = trained / "checkpoint.pt"
    path.write_bytes(SPOILED[name](bytearray(path.read_bytes())))
    kept = ("checkpoint.pt", "config.yaml", "hyperparameters.safetensors", "metrics.jsonl", "result.json")
    before = {name: (trained / name).read_bytes() for name in kept}
    refused = iris(trained, "resume=true", "outer_steps=9", check=False)
    assert refused.returncode == 1
    assert re.search(rf"ResumeError: .*{path}.*resume=false", refused.stderr)
    assert {name: (trained / name).read_bytes() for name in kept} == before
    if name == "truncated":  # starting over, as one is told, ends in the same bits
        whole = result(trained)
        iris(trained, "resume=false")
        assert result(trained) == whole


@pytest.mark.parametrize("name", UNREAD)
def test_a_file_that_is_not_whole_is_not_read(trained: Path, name: str) -> None:
    path = trained / "checkpoint.pt"
    path.write_bytes(UNREAD[name](bytearray(path.read_bytes())))
    with pytest.raises(zipfile.BadZipFile):
        read_whole(path)


@pytest.mark.parametrize("spoil", [lambda text: text[:-9], lambda text: text * 2])
def test_rows_that_do_not_go_with_the_checkpoint_are_named_or_cut(trained: Path, spoil: Callable[[str], str]) -> None:
    path = trained / "metrics.jsonl"
    text = path.read_text()
    path.write_text(spoil(text))
    process = iris(trained, "resume=true", "checkpoint_every=4", check=False)
    if spoil(text).startswith(text):  # too many are what a kill leaves
        assert process.returncode == 0
        assert path.read_text() == text
    else:
        assert re.search(r"metrics\.jsonl does not hold the 6 rows.*resume=false", process.stderr)


def test_a_checkpoint_of_another_model_is_refused(trained: Path) -> None:
    assert "of another run" in iris(trained, "resume=true", "task.hidden=9", check=False).stderr
