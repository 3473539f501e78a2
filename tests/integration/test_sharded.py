"""Two and four processes under gloo whose weights are sharded: the hypergradient is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharded_job as job
import torch
from cases import same
from jobs import run_ranks
from torch import Tensor
from torch.testing import assert_close

import hoptim


@pytest.fixture(scope="module", params=[2, 4])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in each case."""
    folder = tmp_path_factory.mktemp(f"shards{request.param}")
    run_ranks(request.param, job.__file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def equal_on_all_ranks(world: list[dict[str, Any]], case: str) -> dict[str, Any]:
    """The case's answer, the same to the last bit on each rank."""
    answers = [answers[case] for answers in world]
    assert all(same(answers[0], other) for other in answers[1:])
    return answers[0]


def assert_answer(found: dict[str, Any], expected: dict[str, Any], share: float = 1e-12) -> None:
    """Each tensor is right up to this share of its length."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_answer(found[name], value, share)
        elif isinstance(value, Tensor):
            error, length = float((found[name] - value).norm()), float(value.norm())
            assert error <= share * max(length, 1e-3), f"{name}: off by {error / length:.2g} of {length:.3g}"
        else:
            assert found[name] == value, name


def batches(layout: str, size: int, step: int = 0) -> Any:
    return job.joined([job.shard(number, step) for number in job.LAYOUTS[layout].batches(size)])


def val_batches(layout: str, size: int) -> Any:
    return job.joined([job.val_shard(number) for number in job.LAYOUTS[layout].batches(size)])


def one_process(layout: str, size: int, how: job.How, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Any]:
    model = job.build(dtype, **{**job.LAYOUTS[layout].options, "few": how.few})
    after = [batches(layout, size, step) for step in (1, 2, 3)]
    return job.answer(job.problem_of(model, **options), batches(layout, size), val_batches(layout, size), how, after)


KINDS = pytest.mark.parametrize("kind", ["torch.float64", "torch.float32", "large"])


@KINDS
@pytest.mark.parametrize("layout", job.ON_BOTH)
def test_every_way_to_shard_gives_the_hypergradient_of_one_process(
    world: list[dict[str, Any]], layout: str, kind: str
) -> None:
    check_layout(world, layout, kind)


@KINDS
@pytest.mark.parametrize("layout", job.FOR_TWO)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_so_it_does_on_two_ranks(world: list[dict[str, Any]], layout: str, kind: str) -> None:
    check_layout(world, layout, kind)


@KINDS
@pytest.mark.parametrize("layout", job.FOR_FOUR)
@pytest.mark.parametrize("world", [4], indirect=True)
def test_so_do_ranks_in_rows_and_columns(world: list[dict[str, Any]], layout: str, kind: str) -> None:
    check_layout(world, layout, kind)


def check_layout(world: list[dict[str, Any]], layout: str, kind: str) -> None:
    found = equal_on_all_ranks([answers["layouts"] for answers in world], f"{layout}, {kind}")
    dtype = torch.float32 if kind == "torch.float32" else torch.float64
    expected = one_process(layout, len(world), job.METHODS["default"], dtype)
    if dtype == torch.float32:  # x as one vector, since a small entry of it is a difference of larger numbers
        found, expected = (
            {**one, "x": torch.cat([part.reshape(-1) for part in one["x"].values()])} for one in (found, expected)
        )
    assert_answer(found, expected, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("layout", job.ON_BOTH)
def test_ranks_hold_parts_of_unequal_size(world: list[dict[str, Any]], layout: str) -> None:
    """Seven rows over two or four ranks, and one number, of which all ranks but the first hold nothing."""
    held = torch.tensor([answers["layouts"][layout]["held"] for answers in world])
    whole = torch.tensor([p.numel() for p in job.build(**job.LAYOUTS[layout].options).parameters()])
    copied = (held == whole).all(0)
    assert torch.equal(held[:, ~copied].sum(0), whole[~copied])
    assert int(copied.sum()) == {"a plain weight": 1, "tensor parallel": 7}.get(layout, 0)
    if layout != "tensor parallel":
        assert (held != held[0]).any()
    if layout == "nested":
        assert (held == 0).any()


@pytest.mark.parametrize("method", job.METHODS)
def test_every_method_gives_the_hypergradient_of_one_process(world: list[dict[str, Any]], method: str) -> None:
    found, layout = equal_on_all_ranks(world, "methods")[method], job.layout_of(len(world))
    method = "minres" if method == "compiled" else method
    share = 2e-6 if method == "differences" else 1e-10 if method == "warm" else 1e-11
    assert_answer(found, one_process(layout, len(world), job.METHODS[method]), share)


def test_mean_of_each_ranks_own_answer_would_be_another() -> None:
    how = job.METHODS["default"]
    own = [job.answer(job.problem_of(job.build()), job.shard(n), job.val_shard(n), how)["grads"]["decay"] for n in range(2)]
    right = one_process("nested", 2, how)["grads"]["decay"]
    assert float((torch.stack(own).mean(0) - right).abs().max()) > 1e-4


def test_vector_of_losses_goes_through_the_same_products(world: list[dict[str, Any]]) -> None:
    found, size = equal_on_all_ranks(world, "vector"), len(world)
    layout = job.layout_of(size)
    rows = [
        [tuple(part[half] for part in job.val_shard(n)[:2]) for n in job.LAYOUTS[layout].batches(size)] for half in HALVES
    ]
    val = job.joined([(*job.joined([(*one, 0) for one in half])[:2], 0) for half in rows])
    for name, one in found.items():
        problem = job.problem_of(job.build(), val=job.several)
        expected = job.answer(problem, batches(layout, size), val, job.METHODS[name], [batches(layout, size)])
        assert_answer(one, expected, 2e-6 if name == "differences" else 1e-11)


HALVES = (slice(4), slice(4, 8))


def test_dropout_and_uneven_batches_are_those_of_each_rank(world: list[dict[str, Any]]) -> None:
    """One mask for a whole solve, of each rank's own; and the mean of the ranks' means."""
    size, plain = len(world), job.problem_of(job.build(dropout=0.4))

    def mean(loss: Any) -> Any:
        return lambda m, h, bs: torch.stack([loss(m, h, b) for b in bs]).mean()

    problem = hoptim.Problem(plain.model, plain.hparams, mean(plain.train_loss), mean(plain.val_loss))
    shards = [job.shard(rank, n=6 - rank) for rank in range(size)]
    expected = job.answer(problem, shards, [job.val_shard(rank) for rank in range(size)], job.METHODS["minres"])
    assert_answer(equal_on_all_ranks(world, "random"), expected, 1e-11)


def test_weights_and_hyperparameters_that_only_some_ranks_touch(world: list[dict[str, Any]]) -> None:
    """Way r, at weights w and decay λ: A = (2 XᵀX / n + 2 λ I) / R for each row, and so on, from the losses written out."""
    found, size = equal_on_all_ranks(world, "routed"), len(world)
    assert found["untouched"] == tuple(f"decay{way}" for way in range(size, 5))
    model = job.Ways().double()
    for rank in range(size):
        (x, _), (v, _) = job.ways_batch(rank), job.ways_batch(rank + 10)
        w, decay = model.ways[rank].weight.detach(), 0.5 + rank
        A = (x.T @ x / len(x) + 2 * decay * torch.eye(2)) / size  # the mean over n examples of 2 outputs
        g = (w @ v.T + 1) @ v / len(v) / size
        expected = -(2 * w / size * torch.linalg.solve(A, g.T).T).sum()
        assert_close(found["grads"][f"decay{rank}"], expected)


def check_training(world: list[dict[str, Any]], case: str, layout: str, hypersteps: int, share: float) -> None:
    found, size = equal_on_all_ranks(world, case), len(world)
    model = job.build(**job.LAYOUTS[layout].options)
    optimizer = job.bilevel(job.problem_of(model), val_batches(layout, size), every=1, warmup=6)
    expected = job.train_on(optimizer, [batches(layout, size, step % 7) for step in range(5 + hypersteps)])
    assert found["hypersteps"] == hypersteps
    assert_answer(found, expected, share)


def test_training_is_that_of_one_process_and_all_ranks_hold_the_same_bits(world: list[dict[str, Any]]) -> None:
    check_training(world, "training", job.layout_of(len(world)), 20, 2e-13)
    check_training(world, "short_training", "hybrid" if len(world) == 4 else "tensor parallel", 3, 1e-11)


@pytest.mark.parametrize("kind", job.DECAYS)
def test_decays_in_the_step_are_those_of_one_process(world: list[dict[str, Any]], kind: str) -> None:
    found, size = equal_on_all_ranks(world, "decays_in_steps"), len(world)
    for layout in ("hybrid", "both") if size == 4 else ("nested", "tensor parallel"):
        train = [batches(layout, size, step) for step in range(10)]
        expected = job.with_decays(job.build(), kind, train, val_batches(layout, size))
        assert_answer(found[f"{layout}, {kind}"], expected, 1e-5 if kind == "by differences" else 1e-10)
        assert kind != "lasso" or bool((expected["tensors"]["weight head.weight"] == 0).any())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_and_after_200_hypersteps(size: int, tmp_path: Path) -> None:
    run_ranks(size, job.__file__, tmp_path, "long_training")
    world = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    check_training(world, "long_training", job.layout_of(size), 200, 1e-9)


def test_a_look_at_the_model_before_a_hyperstep_changes_nothing(world: list[dict[str, Any]]) -> None:
    found, size = equal_on_all_ranks(world, "evaluated"), len(world)
    assert found.pop("kinds") == [False] * 3  # whole weights, which torch leaves in the root after it
    optimizer = job.bilevel(job.problem_of(job.build()), val_batches("nested", size), every=None)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.loss(batches("nested", size, step)).backward()
        optimizer.step()
        optimizer.hyperstep()
    assert_answer(found, job.end(optimizer), 1e-10)


def test_accumulation_sees_the_micro_batches_of_all_ranks(world: list[dict[str, Any]]) -> None:
    size = len(world)
    optimizer = job.bilevel(job.problem_of(job.build()), val_batches("nested", size), every=2)
    for step in range(4):
        optimizer.zero_grad()
        for part, share in enumerate((0.75, 0.25)):
            (share * optimizer.loss(batches("nested", size, 2 * step + part))).backward()
        optimizer.step()
    assert_answer(equal_on_all_ranks(world, "accumulated"), job.end(optimizer), 1e-10)


def test_a_hypergradient_leaves_no_trace(world: list[dict[str, Any]]) -> None:
    for answers in world:
        for place, pairs in answers["no_trace"].items():
            for before, after in pairs:
                for what, value in before.items():
                    assert same(value, after[what]), (place, what)


def test_retraining_is_that_of_one_process(world: list[dict[str, Any]]) -> None:
    found = equal_on_all_ranks([answers["trainings"] for answers in world], "retrained")
    assert_answer(found, job.retrained(job.build, *range(len(world))), 1e-10)


def test_a_fit_of_folds_is_that_of_one_process(world: list[dict[str, Any]]) -> None:
    found = equal_on_all_ranks([answers["trainings"] for answers in world], "crossed")
    assert_answer(found, job.crossed(None, 0, 1), 1e-10)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("rounded param_dtype", "TypeError: FiniteDifference.*casts to torch.bfloat16.*Take hoptim.Exact"),
        ("rounded reduce_dtype", "TypeError: FiniteDifference.*casts to torch.bfloat16.*Take hoptim.Exact"),
        ("stepping", "TypeError: weight 'gain' has a hook that runs when its gradient is there.*hoptim.Exact"),
        ("update", "TypeError: the condition Update.*whose state is sharded.*take hoptim.Gradient"),
        ("ekfac", r"TypeError: EKFAC needs whole weights.*take Jacobi\(\)"),
        ("unrolled", "TypeError: Unrolled repeats inner steps.*take hoptim.Implicit"),
        ("replay", "TypeError: Replay repeats inner steps.*take hoptim.Implicit"),
        ("learned", "TypeError: hyperparameter 'weight_decay'.*can't be learned where weights are sharded.*WeightDecay"),
        ("audit", "ValueError: an audit is for one process.*neither wrapped nor sharded"),
        ("alone", r"ValueError: the weight '\w+.*' is sharded over the ranks \[0, 1.*leave process_group as it is"),
    ],
)
def test_what_does_not_work_is_refused_with_what_works(world: list[dict[str, Any]], case: str, words: str) -> None:
    for answers in world:
        assert_matches(words, answers["refusals"][case])


def assert_matches(words: str, text: str) -> None:
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(text)


def test_a_policy_of_mixed_precision_lowers_the_training_loss_and_no_hypergradient(world: list[dict[str, Any]]) -> None:
    assert all(1e-5 < abs(answers["mixed"]["away"]) < 1e-2 for answers in world)
    assert all(same(answers["mixed"]["answer"], answers["layouts"]["nested, torch.float32"]) for answers in world)


def test_differences_run_a_model_that_divides_its_heads_among_the_ranks(world: list[dict[str, Any]]) -> None:
    found = equal_on_all_ranks(world, "heads")
    assert_answer(found, job.heads(0, 1), 1e-6)


def test_ranks_with_parts_of_one_layer_need_the_same_batches(world: list[dict[str, Any]]) -> None:
    found = equal_on_all_ranks(world, "other_batches")
    assert len(found) == (4 if len(world) == 4 else 2)
    for words in found.values():
        assert_matches("ValueError: the losses of the ranks are .*same batches and the same random seed", words)


def test_plain_weights_that_are_apart_are_an_error(world: list[dict[str, Any]]) -> None:
    words = "ValueError: the weights differ between the . ranks .*shard all of them, or average the gradients"
    assert_matches(words, equal_on_all_ranks(world, "apart")["words"])


def test_nan_on_one_rank_is_the_same_status_on_all(world: list[dict[str, Any]]) -> None:
    for name, value in equal_on_all_ranks(world, "nan_on_one").items():
        assert value == (True if name.endswith("still") else ("NON_FINITE_LOSS", False))
