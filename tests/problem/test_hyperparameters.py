from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations

from hoptim import HyperParameters, Implicit, Neumann, Problem, hypergradient
from hoptim.problem.outer_adam import outer_adam

# In the order in which a module that holds them lists them: its own first, then those of its children.
AWKWARD = ["a\\b", "leaf:x", "_names", "a b", "λ", "0", "layer.x", "layer.0.weight", "layer.0.bias", "1.keys", "1.0.0"]
REFUSED = [
    "training",
    "half",
    "forward",
    "T_destination",
    "keys",
    "project_",
    "_constraints",
    "_modules",
    "layer.training",
    "parameters.weight",
    "a.b.add_module",
    "",
    ".",
    "a.",
    ".a",
    "a..b",
]

CONSTRAINTS: dict[str, tuple[Any, Tensor, Tensor]] = {  # constraint, natural value, leaf
    "real": (constraints.real, torch.tensor([-2.0, 3.0]), torch.tensor([-2.0, 3.0])),
    "positive": (constraints.positive, torch.tensor([1.0, 0.25]), torch.tensor([1.0, 0.25]).double().log()),
    "unit_interval": (constraints.unit_interval, torch.tensor([0.5, 0.9]), torch.tensor([0.5, 0.9]).double().logit()),
    "interval": (constraints.interval(-1.0, 3.0), torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.25]).double().logit()),
    "nonnegative": (constraints.nonnegative, torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0])),
}


def awkward() -> HyperParameters:
    return HyperParameters({name: torch.tensor([float(i), 1.0]) for i, name in enumerate(AWKWARD)})


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_value_and_leaf_are_joined_by_the_constraint(name: str) -> None:
    constraint, value, leaf = CONSTRAINTS[name]
    hparams = HyperParameters({"x": value.double()}, {"x": constraint})
    torch.testing.assert_close(hparams["x"].detach(), value.double(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(dict(hparams.named_parameters())["x"].detach(), leaf.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_value_stays_inside_wherever_the_leaf_goes(name: str) -> None:
    constraint, value, _ = CONSTRAINTS[name]
    hparams = HyperParameters({"x": value.double()}, {"x": constraint})
    for move in (-5.0, 5.0, 5.0):
        with torch.no_grad():
            next(hparams.parameters()).add_(move)
        hparams.project_()
        assert constraint.check(hparams["x"]).all()


def test_simplex_keeps_its_sum() -> None:
    value = torch.tensor([0.2, 0.3, 0.5])
    hparams = HyperParameters({"mix": value}, {"mix": constraints.simplex})
    torch.testing.assert_close(hparams["mix"].detach(), value)
    with torch.no_grad():
        next(hparams.parameters()).add_(torch.tensor([1.0, -2.0]))
    assert hparams["mix"].sum().item() == pytest.approx(1.0)
    assert (hparams["mix"] > 0).all()


def test_projection_clamps_the_nonnegative_ones_only() -> None:
    values = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 2.0])}
    hparams = HyperParameters(values, {"a": constraints.nonnegative})
    with torch.no_grad():
        for leaf in hparams.parameters():
            leaf.sub_(1.5)
    hparams.project_()
    assert hparams["a"].tolist() == [0.0, 0.5]
    assert hparams["b"].tolist() == [-0.5, 0.5]


def test_values_given_are_copied() -> None:
    value = torch.tensor([1.0])
    hparams = HyperParameters({"x": value})
    value.fill_(9.0)
    assert hparams["x"].item() == 1.0


def test_awkward_names_are_the_users_everywhere() -> None:
    hparams = awkward()
    assert list(hparams) == hparams.keys() == list(dict(hparams)) == AWKWARD
    assert [name for name, _ in hparams.named_parameters()] == list(hparams.state_dict()) == AWKWARD
    assert [name for name, _ in hparams.named_parameters(prefix="p")] == ["p." + name for name in AWKWARD]
    assert [hparams[name][0].item() for name in AWKWARD] == [float(i) for i in range(len(AWKWARD))]
    assert len(hparams) == len(AWKWARD)
    assert "layer.0.weight" in hparams
    assert "layer.0" not in hparams


def test_names_that_differ_are_kept_apart() -> None:
    names = ["a\\b", "a.b", "a\\.b", "a.\\b", "b.a"]
    hparams = HyperParameters({name: torch.tensor(float(i)) for i, name in enumerate(names)})
    assert [hparams[name].item() for name in names] == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_no_parameter_of_a_module_can_have_is_refused(name: str) -> None:
    with pytest.raises(KeyError, match=r"already exists|be empty"):
        HyperParameters({"x": torch.ones(1), name: torch.ones(1)})


@pytest.mark.parametrize("names", [["a", "a.b"], ["a.b", "a"], ["a.b.c", "a.b"]], ids=str)
def test_a_name_that_is_also_the_prefix_of_another_is_refused(names: list[str]) -> None:
    with pytest.raises(KeyError, match="already exists"):
        HyperParameters({name: torch.ones(1) for name in names})


# A module as torch promises


def named() -> nn.Module:
    """A model whose weights have names of many kinds."""
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 3), nn.Tanh(), parametrizations.weight_norm(nn.Linear(3, 1)))})
    model["attention"] = nn.TransformerEncoderLayer(2, 1, 4)
    model["scales"] = nn.ParameterDict({"a b": torch.ones(2), "λ": torch.ones(())})
    model["shifts"] = nn.ParameterList([torch.zeros(3), torch.ones(3)])
    model.register_parameter("gain", nn.Parameter(torch.ones(())))
    return model


def test_the_names_of_any_model_name_hyperparameters() -> None:
    names = dict(named().named_parameters())
    hparams = HyperParameters({name: torch.full_like(p, i) for i, (name, p) in enumerate(names.items())})
    assert [name for name, _ in hparams.named_parameters()] == list(names) == list(hparams)
    for i, name in enumerate(names):
        assert hparams.get_parameter(name) is hparams[name]
        torch.testing.assert_close(hparams[name].detach(), torch.full_like(names[name], i))


def positive_and_real() -> HyperParameters:
    return HyperParameters({"0.weight": torch.ones(2), "a": torch.tensor(3.0)}, {"0.weight": constraints.positive})


@pytest.mark.parametrize("prefix", ["", "inside."])
def test_every_name_of_a_parameter_serves_where_torch_takes_one(prefix: str) -> None:
    hparams = positive_and_real()
    module = nn.ModuleDict({"inside": hparams}) if prefix else hparams
    names = [f"{prefix}a", f"{prefix}0.weight"]
    assert [name for name, _ in module.named_parameters()] == list(module.state_dict()) == names
    assert module.get_parameter(f"{prefix}a") is hparams["a"]
    assert module.get_parameter(f"{prefix}0.weight").tolist() == [0.0, 0.0]
    assert module.get_submodule(f"{prefix}0") is hparams.get_submodule("0")
    state = {f"{prefix}a": torch.tensor(5.0), f"{prefix}0.weight": torch.tensor([1.0, 2.0])}
    module.load_state_dict(state, strict=True)
    assert hparams["a"].item() == 5.0
    torch.testing.assert_close(hparams["0.weight"].detach(), torch.tensor([1.0, 2.0]).exp())


@pytest.mark.parametrize("low", [0.0, 0.5, torch.tensor([0.0, 1.0])])
def test_a_value_above_a_bound_is_that_of_torchs_own_map(low: Any) -> None:
    constraint = constraints.greater_than(low)
    hparams = HyperParameters({"a": torch.tensor([2.0, 3.0])}, {"a": constraint})
    theirs = torch.distributions.biject_to(constraint)(hparams.a)
    assert torch.equal(hparams["a"], theirs)
    slopes = [torch.autograd.grad(value.sum(), hparams.a)[0] for value in (hparams["a"], theirs)]
    assert torch.equal(*slopes)


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = positive_and_real()

    def forward(self, name: str) -> Tensor:
        return 2 * self.inside[name]


@pytest.mark.parametrize(("module", "prefix", "factor"), [(positive_and_real(), "", 1), (Inside(), "inside.", 2)])
def test_a_functional_call_gives_the_natural_value_at_other_leaves(module: nn.Module, prefix: str, factor: int) -> None:
    leaf = torch.tensor([0.0, 1.0], requires_grad=True)
    value = functional_call(module, {f"{prefix}0.weight": leaf}, ("0.weight",))
    torch.testing.assert_close(value, factor * leaf.exp())
    torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0], factor * leaf.detach().exp())
    assert functional_call(module, {f"{prefix}a": torch.tensor(4.0)}, ("a",)).item() == 4.0 * factor
    assert module("a").item() == 3.0 * factor


def test_stacked_states_give_all_values_at_once() -> None:
    several = [positive_and_real() for _ in range(3)]
    for i, one in enumerate(several):
        one["0.weight"], one["a"] = torch.tensor([1.0, i + 1.0]), torch.tensor(float(i))
    parameters, buffers = stack_module_state(several)
    assert list(parameters) == ["a", "0.weight"]

    def both(parameters: Any, buffers: Any) -> Tensor:
        weight, a = (functional_call(several[0], (parameters, buffers), (name,)) for name in ("0.weight", "a"))
        return a * weight

    expected = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 6.0]])
    torch.testing.assert_close(vmap(both)(parameters, buffers), expected)


def test_an_attribute_is_the_leaf() -> None:
    hparams = positive_and_real()
    assert hparams.a is hparams.get_parameter("a")
    assert getattr(hparams, "0").weight.tolist() == [0.0, 0.0]
    with pytest.raises(TypeError, match="as parameter 'a'"):
        hparams.a = torch.tensor(1.0)
    hparams.note = "kept"
    assert hparams.eval().training is False
    assert (hparams.note, hparams["a"].item()) == ("kept", 3.0)


def test_a_state_may_be_assigned() -> None:
    hparams, state = positive_and_real(), {"a": torch.tensor(5.0), "0.weight": torch.zeros(2)}
    hparams.load_state_dict(state, assign=True)
    assert hparams.a.data_ptr() == state["a"].data_ptr()
    assert hparams["0.weight"].tolist() == [1.0, 1.0]
    assert isinstance(hparams.a, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_inside_another_module_move_with_it(dtype: torch.dtype) -> None:
    outside = nn.ModuleDict({"inside": positive_and_real().double()}).to(dtype)
    assert {p.dtype for p in outside.parameters()} == {dtype}
    assert outside["inside"]["0.weight"].dtype == dtype
    assert outside["inside"]["0.weight"].tolist() == [1.0, 1.0]


def test_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(KeyError, match=r"no hyperparameter 'decay'.*'weight_decay'"):
        HyperParameters({"weight_decay": torch.tensor(1.0)})["decay"]


def test_state_dict_round_trip_is_strict() -> None:
    hparams, other = awkward(), awkward()
    with torch.no_grad():
        for leaf in hparams.parameters():
            leaf.add_(0.5)
    other.load_state_dict(hparams.state_dict(), strict=True)
    assert all(torch.equal(other[name], hparams[name]) for name in AWKWARD)


def test_state_dict_inside_another_module() -> None:
    def parent() -> nn.Module:
        return nn.ModuleDict({"hp": awkward(), "net": nn.Linear(1, 1)})

    state = parent().state_dict()
    assert [key for key in state if key.startswith("hp.")] == ["hp." + name for name in AWKWARD]
    other = parent()
    other.load_state_dict(state, strict=True)
    assert same_keys(other.state_dict(), state)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "hp\.new\.one"'):
        other.load_state_dict({**state, "hp.new.one": torch.ones(1)})


def same_keys(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_missing_unexpected_and_misshapen_keys_are_reported_by_the_users_names() -> None:
    hparams = HyperParameters({"layer.weight": torch.ones(2), "a": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "layer\.weight"'):
        hparams.load_state_dict({"a": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "layer\.bias"'):
        hparams.load_state_dict({**hparams.state_dict(), "layer.bias": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for layer\.weight"):
        hparams.load_state_dict({"layer.weight": torch.ones(3), "a": torch.ones(1)})
    found = hparams.load_state_dict({"layer.bias": torch.ones(1)}, strict=False)
    assert found.missing_keys == ["a", "layer.weight"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_the_values_the_constraints_and_memory_of_their_own(duplicate: Callable[[Any], Any]) -> None:
    values = {f"{name}.x": value.double() for name, (_, value, _) in CONSTRAINTS.items()}
    given = {f"{name}.x": constraint for name, (constraint, _, _) in CONSTRAINTS.items()}
    hparams = HyperParameters({**values, "mix": torch.tensor([0.3, 0.7])}, {**given, "mix": constraints.simplex})
    other = duplicate(hparams)
    assert dict(other).keys() == dict(hparams).keys()
    assert all(torch.equal(other[name], hparams[name]) for name in hparams)
    with torch.no_grad():
        for leaf in other.parameters():
            leaf.sub_(1.0)
    other.project_()
    assert other["nonnegative.x"].tolist() == [0.0, 1.0]
    assert all(not torch.equal(other[name], hparams[name]) for name in hparams)


def test_awkward_names_go_through_a_problem() -> None:
    hparams = HyperParameters({name: torch.tensor(1.0) for name in AWKWARD})
    model = nn.ParameterDict({"w": torch.zeros(len(AWKWARD))})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return 0.5 * (m["w"] - torch.stack([h[name] for name in AWKWARD])).square().sum()

    problem = Problem(model, hparams, train, lambda m, h, b: (m["w"] * torch.arange(1.0, 12.0)).sum())
    grads = hypergradient(problem, None, None, Implicit(Neumann(terms=50))).grads
    assert {name: grad.item() for name, grad in grads.items()} == pytest.approx(
        {name: i + 1.0 for i, name in enumerate(AWKWARD)}
    )


def test_dtype_moves_with_the_module() -> None:
    hparams = HyperParameters({"x": torch.tensor(0.5)}, {"x": constraints.positive}).to(torch.float32)
    assert hparams["x"].dtype == torch.float32
    assert hparams["x"].item() == pytest.approx(0.5)


def test_repr_names_shape_and_constraint() -> None:
    hparams = HyperParameters(
        {"layer.weight": torch.ones(2, 3), "a": torch.ones(())}, {"layer.weight": constraints.positive}
    )
    lines = ["(layer.weight): (2, 3) GreaterThan(lower_bound=0.0)", "(a): () Real()"]
    assert repr(hparams) == "\n  ".join(["HyperParameters(", *lines]) + "\n)"
    hparams.net = nn.Sequential(nn.Tanh())
    lines += ["(net): Sequential(", "  (0): Tanh()", ")"]
    assert repr(hparams) == "\n  ".join(["HyperParameters(", *lines]) + "\n)"


def test_a_value_is_set_in_place_through_its_constraint() -> None:
    hparams = HyperParameters({"a.b": torch.ones(2)}, {"a.b": constraints.positive})
    (leaf,) = hparams.parameters()
    hparams["a.b"] = torch.tensor([0.5, 2.0])
    assert hparams["a.b"].tolist() == pytest.approx([0.5, 2.0])
    assert next(hparams.parameters()) is leaf
    with pytest.raises(ValueError, match=r"'a\.b' has shape \(2,\), the value \(3,\)"):
        hparams["a.b"] = torch.ones(3)
    with pytest.raises(ValueError, match="starts outside"):
        hparams["a.b"] = -torch.ones(2)
    with pytest.raises(KeyError, match="no hyperparameter 'c'"):
        hparams["c"] = torch.ones(2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_a_copy_still_knows_its_constraints(copied: Any) -> None:
    hparams = copied(HyperParameters({"a": torch.ones(1)}, {"a": constraints.nonnegative}))
    hparams["a"] = torch.zeros(1)
    with torch.no_grad():
        next(hparams.parameters()).sub_(1)
    hparams.project_()
    assert hparams["a"].tolist() == [0.0]


def test_buffers_and_submodules_of_a_subclass_are_saved_and_loaded() -> None:
    def made() -> HyperParameters:
        hparams = HyperParameters({"a.b": torch.ones(2)}, {"a.b": constraints.nonnegative})
        hparams.register_buffer("mask", torch.zeros(2))
        hparams.net = nn.Linear(1, 1)
        return hparams

    first, second = made(), made()
    first.mask.fill_(7)
    first["a.b"] = torch.full((2,), 3.0)
    assert sorted(first.state_dict()) == ["a.b", "mask", "net.bias", "net.weight"]
    second.load_state_dict(first.state_dict())
    assert second.mask.tolist() == [7.0, 7.0]
    assert second["a.b"].tolist() == [3.0, 3.0]
    assert torch.equal(second.net.weight, first.net.weight)
    second.project_()


# Names of a wrapped model


def wrappers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def compiled(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="eager")

    return {"module": nn.DataParallel, "_orig_mod": compiled, "_orig_mod.module": lambda m: compiled(nn.DataParallel(m))}


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))


def squares(names: Callable[[str], str] = str) -> Any:
    return lambda m, h, b: m(b).sum() + sum((h[names(name)] * p**2).sum() for name, p in m.named_parameters())


@pytest.mark.parametrize("prefix", wrappers())
def test_names_of_a_wrapped_model_have_a_note(prefix: str) -> None:
    wrapped = wrappers()[prefix](deep())
    hparams = HyperParameters({name: torch.ones_like(p) for name, p in wrapped.named_parameters()})
    problem = Problem(wrapped, hparams, squares(), squares())
    one = torch.ones(1, 2)
    for ask in (lambda: problem.loss(one), lambda: hypergradient(problem, one, one)):
        with pytest.raises(KeyError) as caught:
            ask()
        (note,) = (said for said in caught.value.__notes__ if f"'{prefix}.0.weight' is named after a wrapped" in said)
        assert "name hyperparameters by that, as in ddp.module.named_parameters()" in note
    inside = HyperParameters({name: torch.ones_like(p) for name, p in problem.model.named_parameters()})
    assert Problem(wrapped, inside, squares(), squares()).loss(one).isfinite()  # the remedy


def test_an_unknown_name_among_many_is_one_line() -> None:
    hparams = HyperParameters({name: torch.ones_like(p) for name, p in deep().named_parameters()})
    with pytest.raises(KeyError, match=r"no hyperparameter 'decay': the names are \['0\.bias', .* and 75 more") as caught:
        hparams["decay"]
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("kind", [KeyError, AttributeError])
def test_a_module_of_parameters_with_names_of_a_wrapped_model_has_a_note(kind: type[Exception]) -> None:
    wrapped = nn.DataParallel(nn.Linear(2, 1))

    class Table(nn.ParameterDict):
        def __getitem__(self, key: str) -> Any:
            return super().__getitem__(key) if kind is AttributeError else dict(self.named_parameters())[key]

    values = {name.replace(".", "_"): torch.ones_like(p) for name, p in wrapped.named_parameters()}
    with pytest.raises(kind) as caught:
        Problem(wrapped, Table(values), squares(), squares()).loss(torch.ones(1, 2))
    assert [note for note in vars(caught.value)["__notes__"] if "' is named after a wrapped model" in note]
    with pytest.raises(kind) as caught:
        Problem(wrapped, Table({"decay": torch.ones(1)}), squares(), squares()).loss(torch.ones(1, 2))
    assert "wrapped" not in str(vars(caught.value)["__notes__"])


def test_its_optimizer_has_a_rate_for_each_kind_of_leaf() -> None:
    kinds = {
        "positive": (constraints.positive, 0.05),
        "above_one": (constraints.greater_than(1.0), 0.05),
        "unit": (constraints.unit_interval, 0.3),
        "interval": (constraints.interval(1.0, 3.0), 0.3),
        "nonnegative": (constraints.nonnegative, 0.01),
        "real": (constraints.real, 0.1),
        "simplex": (constraints.simplex, 0.1),
    }
    value = {"simplex": torch.full((4,), 0.25), "above_one": torch.tensor(2.0), "interval": torch.tensor(2.0)}
    values = {name: value.get(name, torch.tensor(0.5)) for name in kinds}
    hparams = HyperParameters(values, {name: kind for name, (kind, _) in kinds.items()})
    for module in (hparams, nn.ModuleDict({"a": hparams, "net": nn.Linear(1, 1)})):
        before = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
        outer = outer_adam(module)
        for leaf in module.parameters():
            leaf.grad = torch.full_like(leaf, 3.0)
        outer.step()
        for name, leaf in module.named_parameters():
            moved = before[name] - leaf  # Adam's first step is its rate
            assert moved.allclose(torch.tensor(kinds.get(name.removeprefix("a."), (None, 0.05))[1])), name
    assert [group["lr"] for group in hparams.optimizer(lr=0.2).param_groups] == [0.2]
    assert [len(group["params"]) for group in hparams.optimizer().param_groups] == [2, 2, 1, 2]


# Starts near an edge


def float32(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


NEAR: dict[str, tuple[Any, Tensor, str]] = {
    "a corner of the simplex": (constraints.simplex, float32(1.0, 0.0), "on the edge"),
    "an edge of the simplex": (constraints.simplex, float32(0.5, 0.5, 0.0), "on the edge"),
    "a part that is lost beside 1": (constraints.simplex, float32(1.0, 1e-8), "1e-08, and its leaf gives 1.19e-07"),
    "a part that is coarse beside 1": (constraints.simplex, float32(0.5, 0.5, 1e-7), "1e-07, and its leaf gives"),
    "the smallest number": (constraints.unit_interval, float32(0.5, 1e-42), "1e-42, and its leaf gives 1.18e-38"),
    "one inside another": (constraints.independent(constraints.unit_interval, 1), float32(0.5, 1.0), "on the edge"),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_start_that_its_leaf_does_not_give_back_is_refused(name: str) -> None:
    constraint, value, words = NEAR[name]
    with pytest.raises(ValueError, match=f"'x' starts {words if 'on' in words else f'at {words}'}"):
        HyperParameters({"x": value}, {"x": constraint})
    hparams = HyperParameters({"x": torch.full_like(value, 1 / len(value))}, {"x": constraint})
    before = hparams["x"].detach()
    with pytest.raises(ValueError, match="'x' starts"):
        hparams["x"] = value
    assert torch.equal(hparams["x"], before)


INSIDE: dict[str, tuple[Any, Tensor]] = {
    "an uneven mixture": (constraints.simplex, float32(1 - 1e-5, 1e-5)),
    "the same in float64": (constraints.simplex, torch.tensor([1 - 1e-8, 1e-8], dtype=torch.float64)),
    "a thousand classes": (constraints.simplex, float32(*[1e-6] * 500, 1 - 999e-6, *[1e-6] * 499)),
    "an interval around zero": (constraints.interval(-1.0, 3.0), float32(0.0, 1e-9, -1 + 1e-6, 3 - 1e-6)),
    "one of many inside another": (constraints.independent(constraints.interval(-1.0, 3.0), 1), float32(0.0, 1e-9)),
    "very small ones": (constraints.positive, float32(1e-37, 1e-9, 1e30)),
    "rates in bf16": (constraints.positive, torch.tensor([1e-4, 1e-9], dtype=torch.bfloat16)),
    "weights near both ends": (constraints.unit_interval, float32(1e-30, 1e-3, 1 - 1e-6)),
    "zeros of a matrix": (constraints.corr_cholesky, torch.eye(3)),
    "parts of one vector": (
        constraints.cat([constraints.interval(-1.0, 3.0), constraints.positive]), float32(0.0, 1e-9)
    ),
    "zeros": (constraints.nonnegative, float32(0.0, 1e-42)),
    "none": (constraints.positive, float32()),
    "a simplex of one": (constraints.simplex, float32(1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_a_start_inside_is_given_back(name: str) -> None:
    constraint, value = INSIDE[name]
    hparams = HyperParameters({"x": value}, {"x": constraint})
    rtol = 0.1 if value.dtype is torch.bfloat16 else 1e-2
    torch.testing.assert_close(hparams["x"].detach(), value, rtol=rtol, atol=1e-6 if (value <= 0).any() else 0)
    hparams["x"] = value
    torch.testing.assert_close(hparams["x"].detach(), value, rtol=rtol, atol=1e-6 if (value <= 0).any() else 0)
