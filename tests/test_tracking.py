"""Trackers as hooks of a plain training loop."""

import json

import pytest
import torch
from torch import nn
from wandb_file import read_finished as read

import hoptim
from hoptim.tracking import Console, JsonLines, WandB


def ridge(hook, every=1, decay=0.5, solver=None):
    """One weight, one decay: 0.5·(w − 4)² + 0.5·decay·w², validated at 1."""
    model, hparams = nn.Linear(1, 1, bias=False), hoptim.HyperParameters({"decay": torch.tensor([decay])})
    nn.init.constant_(model.weight, 1.0)
    problem = hoptim.Problem(
        model,
        hparams,
        lambda m, h, x: 0.5 * (m(x) - 4).square().sum() + 0.5 * (h["decay"] * m.weight.square()).sum(),
        lambda m, h, x: 0.5 * (m(x) - 1).square().sum(),
    )
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(hparams.parameters(), lr=0.1)
    return hoptim.BilevelOptimizer(
        inner, outer, problem, val_batches=[torch.ones(1, 1)], every=every, hooks=[hook],
        hypergradient=hoptim.Implicit(solver or hoptim.Neumann()),
    )  # fmt: skip


def steps(optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        optimizer.loss(torch.ones(1, 1)).backward()
        optimizer.step()


def test_json_lines_hold_the_records(tmp_path):
    path, seen = tmp_path / "deep" / "metrics.jsonl", []
    optimizer = ridge(JsonLines(path=path))
    optimizer.hooks += (lambda record: seen.append(record.row()),)
    steps(optimizer, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == seen
    assert [row["hyper_step"] for row in seen] == [1, 2, 3]


def test_console_prints_one_line_and_what_to_do_after_a_failure(capsys):
    steps(ridge(Console()), 1)
    assert "FINISHED" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="STEP_TOO_LARGE"):
        steps(ridge(Console(), solver=hoptim.Neumann(terms=50, step_size=5.0)), 1)
    assert "Take a smaller step_size" in " ".join(capsys.readouterr().out.split())


def test_wandb_hook_logs_each_hyperstep_against_both_axes(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = WandB(project="mine", directory=tmp_path)
    optimizer = ridge(tracker, every=2)
    steps(optimizer, 6)
    tracker.finish({"answer": 42})
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    run = read(path)
    assert (run["project"], run["summary"]["answer"], run["exit"]) == ("mine", 42, 0)
    assert [row["inner_step"] for row in run["history"]] == [2, 4, 6]
    assert [row["outer_step"] for row in run["history"]] == [1, 2, 3]
    assert run["history"][-1]["outer/val_loss"] == float(optimizer.record.result.val_loss)
    assert sum(run["history"][-1]["hyperparameters/decay/values"]) == 1


def test_an_abandoned_run_is_marked_failed_and_the_next_is_another(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = WandB(directory=tmp_path)
    first = tracker.start().id
    tracker.abandon()
    assert tracker.start().id != first
    tracker.finish()
    exits = {run["id"]: run["exit"] for run in map(read, tmp_path.glob("wandb/offline-run-*/*.wandb"))}
    assert exits.pop(first) == 1
    assert set(exits.values()) == {0}


def test_console_says_what_failed_though_the_loss_is_nan(capsys):
    optimizer = ridge(Console())
    optimizer.problem.val_loss = lambda m, h, x: m(x).sum() * float("nan")
    with pytest.warns(UserWarning, match="NON_FINITE_LOSS"):
        steps(optimizer, 1)
    assert "NON_FINITE_LOSS" in capsys.readouterr().out


def test_wandb_defines_its_axes_in_a_run_that_the_user_opened(tmp_path, monkeypatch):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.init(project="own", dir=tmp_path, mode="offline", settings=wandb.Settings(silent=True, console="off"))
    tracker = WandB()
    steps(ridge(tracker), 2)
    tracker.finish()
    run = read(next(iter(tmp_path.glob("wandb/offline-run-*/*.wandb"))))
    assert (run["project"], run["axes"]["outer/*"]) == ("own", "outer_step")
    assert len(run["history"]) == 2


def test_wandb_that_fails_in_mid_run_stops_no_training(monkeypatch):
    class Broken:
        id = "broken"

        def define_metric(self, *_, **__):
            pass

        def log(self, values):
            raise ConnectionResetError("the service is gone")

    monkeypatch.setattr(WandB, "start", lambda self, config=None: Broken())
    optimizer = ridge(WandB())
    with pytest.warns(UserWarning, match="training goes on without it"):
        steps(optimizer, 1)
    assert optimizer.record.moved


def test_an_empty_wandb_mode_is_offline_and_a_wrong_one_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    tracker = WandB(directory=tmp_path)
    steps(ridge(tracker), 1)
    tracker.finish()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    with pytest.raises(ValueError, match="mode='offlin': give online, offline"):
        WandB(mode="offlin")


def test_a_run_that_is_continued_in_the_same_process_has_its_axes_again(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        tracker = WandB(id="again", directory=folder)
        steps(ridge(tracker), 1)
        tracker.finish()
        run = read(next(iter(folder.glob("wandb/offline-run-*/*.wandb"))))
        assert (run["id"], run["axes"]["outer/*"]) == ("again", "outer_step")
