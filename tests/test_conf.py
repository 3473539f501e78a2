"""Every file of conf/ is used: experiments run, and every strategy is made from its own file."""

import math
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate
from jobs import ROOT, result, train

import hoptim
from conf import composed as made
from hoptim import tracking

FILES = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
EXPERIMENTS = [path.stem for path in FILES if "MULTIRUN" not in path.read_text()]  # sweeps run in test_train.py


def test_every_experiment_runs_for_a_few_steps(tmp_path):
    short = (f"root={tmp_path}", "outer_steps=2", "inner_steps=5", "hoptim/tracker=[]", "plots=false")
    train(*short, f"hydra.run.dir='{tmp_path}/iris/seed=0'")  # iris_replay begins with what it has learned
    train("-m", f"experiment={','.join(name for name in EXPERIMENTS if name != 'iris')}", *short)
    found = [result(path.parent) for path in tmp_path.rglob("result.json")]
    assert sorted(final["name"] for final in found) == sorted(EXPERIMENTS)
    for final in found:
        assert final["inner_steps"] == 10
        assert math.isfinite(final["test_loss"])


def on_exact(solver):
    return hoptim.Implicit(solver, curvature=hoptim.Exact())


def chosen():
    """What Implicit() takes on the task's loss."""
    problem = SimpleNamespace(
        train_loss=hoptim.CompositeLoss(lambda model, hparams, batch: batch, lambda z, hparams, batch: z)
    )
    open_ = hoptim.Implicit().completed(problem)
    return hoptim.Implicit(open_.solver, curvature=open_.curvature)


def damped():
    return hoptim.Implicit(hoptim.Identity(), curvature=hoptim.GaussNewton(), damping=0.5)


def averaged():
    return hoptim.Implicit(hoptim.WarmStart(hoptim.CG(terms=5)), curvature=hoptim.Averaged(batches=4))


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        ([], chosen()),
        (["hoptim/solver=neumann", "hoptim/curvature=exact", "hoptim.solver.terms=5"], on_exact(hoptim.Neumann(terms=5))),
        (["hoptim/solver=identity", "hoptim.method.damping=0.5"], damped()),
        (["hoptim/solver=cg", "hoptim/curvature=exact"], on_exact(hoptim.CG())),
        (
            ["hoptim/solver=gmres", "hoptim/condition=update", "hoptim/preconditioner=jacobi", "hoptim/curvature=exact"],
            hoptim.Implicit(
                hoptim.GMRES(), condition=hoptim.Update(), preconditioner=hoptim.Jacobi(), curvature=hoptim.Exact()
            ),
        ),
        (["hoptim/curvature=averaged", "hoptim/solver=warm_start"], averaged()),
        (["hoptim/method=unrolled", "hoptim.method.steps=5"], hoptim.Unrolled(5)),
        (
            ["hoptim/method=per_task", "hoptim.method.steps=1", "hoptim.method.first_order=true"],
            hoptim.PerTask(1, first_order=True),
        ),
        (["experiment=iris_blog"], on_exact(hoptim.Neumann(terms=5, step_size=0.1))),
    ],
)
def test_the_config_makes_the_method_it_names(overrides, method):
    assert instantiate(made(*overrides).hoptim.method) == method


def test_the_config_makes_every_tracker():
    pytest.importorskip("tensorboard"), pytest.importorskip("mlflow")
    names = "hoptim/tracker=[wandb,tensorboard,mlflow,console,jsonl]"
    trackers = made(names, "hoptim.tracker.jsonl.path=rows.jsonl").hoptim.tracker
    kinds = [type(instantiate(options)) for options in trackers.values()]
    assert kinds == [tracking.WandB, tracking.TensorBoard, tracking.MLflow, tracking.Console, tracking.JsonLines]


def test_a_wrong_number_fails_at_construction_with_the_remedy():
    with pytest.raises(Exception, match="terms=-1: give a whole number"):
        instantiate(made("hoptim.solver.terms=-1").hoptim.method)


def test_every_group_of_strategies_is_a_public_name():
    for path in (ROOT / "conf" / "hoptim").glob("*/*.yaml"):
        lines = [line.split("_target_:")[1].strip() for line in path.read_text().splitlines() if "_target_:" in line]
        assert lines, path
        for target in lines:
            module, _, name = target.rpartition(".")
            public = {"hoptim": hoptim.__all__, "hoptim.recipes": hoptim.recipes.__all__, "hoptim.tracking": dir(tracking)}
            others = {"torch": ["tensor"], "hydra.utils": ["get_object"]}  # what a recipe's values are made of
            assert name in (public | others)[module], target
