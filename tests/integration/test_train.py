"""The seed experiment as a user runs it: its files, its sweeps, its W&B run, and a kill in the middle."""

import json
import os
import re
import signal
import subprocess
import time
from base64 import b64encode
from collections import Counter
from hashlib import md5
from importlib.util import find_spec

import pytest
import torch
from jobs import ROOT, command, env, result, rows, run, run_ranks, start, timeless, torchrun, train, wait_for
from omegaconf import OmegaConf
from safetensors.torch import load_file
from wandb_file import read, read_finished

SHORT = ("outer_steps=4", "inner_steps=20", "task.hidden=16")
QUIET = ("plots=false", "hoptim/tracker=[]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with its pictures and its W&B run."""
    folder = tmp_path_factory.mktemp("finished")
    train(f"hydra.run.dir={folder}", *SHORT)
    return folder


def test_a_run_writes_all_its_files_and_they_agree(finished):
    lines, final = rows(finished), result(finished)
    assert [row["outer_step"] for row in lines] == [1, 2, 3, 4]
    assert [row["inner_step"] for row in lines] == [20, 40, 60, 80]
    assert final["hypersteps"] == 4
    assert final["weights"] == final["hyperparameters"] == 16 * (4 + 16 + 3)
    assert final["products"] == sum(row["products"] for row in lines) == 4 * 5
    assert final["test_loss"] == lines[-1]["test_loss"]
    needed = {"status", "residual", "step_size", "inner_seconds", "hyper_seconds", "hypergradient_norm", "train_accuracy"}
    assert needed <= set(lines[0])
    values = load_file(finished / "hyperparameters.safetensors")
    for name, spread in lines[-1]["hyperparameters"].items():
        assert values[name].mean().item() == pytest.approx(spread["mean"])
        assert [values[name].min().item(), values[name].max().item()] == pytest.approx([spread["min"], spread["max"]])
    assert all((finished / name).stat().st_size > 10_000 for name in ("curves.png", "hyperparameters.png"))
    assert "hidden: 16" in (finished / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("label", "experiment"),
    [
        ("no decay", "iris_none"),
        ("fixed decay 0.01", "iris_uniform"),
        ("fixed decay 0.01, trained on validation too", "iris_joined"),
    ],
)
def test_the_plain_trainings_in_the_picture_are_those_of_their_experiments(finished, tmp_path, label, experiment):
    train(f"hydra.run.dir={tmp_path}", f"experiment={experiment}", *SHORT, *QUIET)
    shown = finished / "baselines" / label
    assert [timeless(row) for row in rows(shown)] == [timeless(row) for row in rows(tmp_path)]
    assert {**result(shown), "name": experiment} == result(tmp_path)


def test_the_comparison_of_runs_leaves_their_plain_trainings_out(finished):
    assert "no decay" not in run("compare.py", finished).stdout


def test_the_wandb_run_reads_back(finished):
    (path,) = finished.glob("wandb/offline-run-*/*.wandb")
    run, lines = read_finished(path), rows(finished)
    assert (run["name"], run["project"], run["exit"]) == ("iris/seed=0", "hoptim", 0)
    assert run["config"]["task"]["hidden"] == 16
    steps = [row for row in run["history"] if "outer_step" in row]
    assert [row["outer_step"] for row in steps] == [1, 2, 3, 4]
    assert [row["inner_step"] for row in steps] == [20, 40, 60, 80]
    for row, line in zip(steps, lines, strict=True):
        assert row["metrics/test_loss"] == line["test_loss"]
        assert row["hypergradient/residual"] == line["residual"]
        assert row["cost/hyper_seconds"] == line["hyper_seconds"]
        last_parts = [key.rpartition("/")[2] for key in row if "/" in key]
        assert last_parts.count("test_loss") == last_parts.count("residual") == 1, "a figure is logged once"
    assert {glob: run["axes"][glob] for glob in ("metrics/*", "hypergradient/*", "cost/*", "hyperparameters/*")} == {
        "metrics/*": "inner_step",
        "hypergradient/*": "outer_step",
        "cost/*": "outer_step",
        "hyperparameters/*": "outer_step",
    }
    assert sum(steps[-1]["histograms/3.weight/values"]) == 16 * 16
    assert steps[-1]["hyperparameters/3.weight/mean"] == pytest.approx(lines[-1]["hyperparameters"]["3.weight"]["mean"])
    assert run["summary"]["test_loss"] == result(finished)["test_loss"]
    images = {key for row in run["history"] for key in row if key.endswith("_type") and row[key] == "image-file"}
    assert images == {"plots/curves/_type", "plots/hyperparameters/_type"}
    files = {"hyperparameters": ["hyperparameters.safetensors"], "pictures": ["curves.png", "hyperparameters.png"]}
    assert {kind: sorted(contents) for kind, contents in run["artifacts"].items()} == files
    for contents in run["artifacts"].values():
        for name, (path, digest) in contents.items():
            assert path.read_bytes() == (finished / name).read_bytes()
            assert digest == b64encode(md5((finished / name).read_bytes()).digest()).decode()


def test_the_runs_of_a_sweep_are_grouped_and_tagged(tmp_path):
    options = ("outer_steps=1", "inner_steps=2", "task.hidden=4", "plots=false")
    train("-m", f"root={tmp_path / 'study'}", "seed=0,1", "outer.lr=0.01", *options)
    runs = [read_finished(path) for path in tmp_path.rglob("wandb/offline-run-*/*.wandb")]
    assert {run["group"] for run in runs} == {"study"}
    (kind,) = {run["job_type"] for run in runs}
    overrides = {"inner_steps=2", "outer.lr=0.01", "outer_steps=1", "task.hidden=4"}
    assert set(kind.split("/")) == {"iris", *overrides}
    assert sorted(sorted(set(run["tags"]) - overrides) for run in runs) == [["iris", "seed=0"], ["iris", "seed=1"]]
    assert {run["name"] for run in runs} == {"iris/seed=0", "iris/seed=1"}


@pytest.mark.parametrize("mode", ["online", "disabled"])
def test_wandb_without_account_or_network_never_stops_a_run(tmp_path, mode):
    server = {"WANDB_MODE": mode, "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    process = train(f"hydra.run.dir={tmp_path}", *SHORT, "plots=false", **server)
    assert result(tmp_path)["status"] == "finished"
    written = list(tmp_path.glob("wandb/offline-run-*"))
    assert len(written) == (mode != "disabled")
    told = [line for line in process.stderr.splitlines() if "W&B" in line and "warnings.warn" not in line]
    assert len(told) == len(written)
    for line, path in zip(told, written, strict=True):
        for words in ("No API key configured", "The run is written offline", "`wandb login`", f"wandb sync {path}"):
            assert words in line


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    options = ("outer_steps=12", "inner_steps=100", "task.hidden=32", "checkpoint_every=3", "plots=false")
    train(f"hydra.run.dir={tmp_path / 'whole'}", "hoptim/tracker=[]", *options)

    folder = tmp_path / "killed"
    process = start("train.py", f"hydra.run.dir={folder}", *options)
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 5:
        assert process.exitcode is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert not (folder / "result.json").exists()

    train(f"hydra.run.dir={folder}", "resume=true", *options)
    assert result(folder) == result(tmp_path / "whole")
    assert [timeless(row) for row in rows(folder)] == [timeless(row) for row in rows(tmp_path / "whole")]
    ids = {read(path)["id"] for path in folder.glob("wandb/offline-run-*/*.wandb")}
    assert len(ids) == 1, "the resumed run has another W&B id"


def test_a_sweep_goes_on_after_a_job_that_fails_and_lists_it_with_its_reason(tmp_path):
    process = train("-m", f"root={tmp_path}", *SHORT, *QUIET, "task.decay=0.01,-1,0.1", check=False)
    assert process.returncode == 1
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("failed: ")]
    assert "task.decay=-1" in line
    assert "ValueError: decay=-1: exp needs a positive start" in line
    outcomes = {str(path.relative_to(tmp_path)): result(path.parent) for path in tmp_path.rglob("result.json")}
    assert Counter(outcome["status"] for outcome in outcomes.values()) == {"finished": 2, "failed": 1}
    table = json.loads((tmp_path / "compare.json").read_text())
    shared = "inner_steps=20/outer_steps=4"
    counts = {label: (entry["runs"], entry["failed"]) for label, entry in table.items() if "best of" not in label}
    named = {decay: f"iris/{shared}/task.decay={decay}/task.hidden=16" for decay in ("0.01", "-1", "0.1")}
    assert counts == {named["0.01"]: (1, 0), named["-1"]: (0, 1), named["0.1"]: (1, 0)}
    assert f"wrote {tmp_path / 'compare.png'} and {tmp_path / 'compare.json'}" in process.stdout
    process = train("-m", f"root={tmp_path / 'none'}", *SHORT, *QUIET, "task.decay=-1", check=False)  # nothing to draw
    assert f"wrote {tmp_path / 'none' / 'compare.json'}\n" in process.stdout


def test_a_sweep_that_goes_on_runs_its_finished_jobs_no_more(tmp_path):
    sweep = ("-m", f"root={tmp_path}", *SHORT, *QUIET)
    train(*sweep, "seed=0,1")
    whole = {path: result(path.parent) for path in tmp_path.rglob("result.json")}
    (first, second) = sorted(whole)
    second.unlink()  # as after a kill in the second job, between its checkpoint and its result
    before = first.stat().st_mtime_ns
    process = train(*sweep, "seed=0,1,2", "resume=true")
    assert "is finished: nothing is run again" in process.stdout
    assert first.stat().st_mtime_ns == before
    assert result(second.parent) == whole[second]
    assert len(list(tmp_path.rglob("result.json"))) == 3
    process = train(*sweep, "seed=0", "resume=true", "outer_steps=5")  # another config is another run
    assert "finished:" not in process.stdout


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_an_option_of_the_wrong_type_is_named_before_anything_starts(tmp_path, sweep):
    values = "4,abc" if sweep else "abc"
    process = train(*sweep, f"root={tmp_path}", *SHORT, *QUIET, f"outer_steps={values}", check=False)
    assert process.returncode == 1
    assert "Value 'abc' of type 'str' could not be converted to Integer" in process.stderr
    assert "outer_steps" in process.stderr
    assert not list(tmp_path.rglob("config.yaml"))
    process = train(*sweep, f"root={tmp_path}", *QUIET, "task.hidden=wide", check=False)
    assert "task.hidden='wide': give a whole number" in process.stderr + process.stdout


def test_mini_batches_schedules_and_recipes_resume_to_the_same_bits(tmp_path):
    options = (
        "experiment=[]", "name=try", "task=classification", "task.train=90", "task.val=60", "outer=by_constraint",
        "hoptim/recipe=[weight_decay,label_smoothing]", "batch_size=20", "val_batch_size=25", "inner_steps=10", "every=5",
        "scheduler=cosine", "scheduler.T_max=60", "retrain=true", "checkpoint_every=1", *QUIET,
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(f"hydra.run.dir={whole}", *options, "outer_steps=6")
    train(f"hydra.run.dir={parts}", *options, "outer_steps=3")
    train(f"hydra.run.dir={parts}", *options, "outer_steps=6", "resume=true")
    assert result(parts) == result(whole)
    assert [timeless(row) for row in rows(parts)] == [timeless(row) for row in rows(whole)]
    final = result(whole)
    assert (final["inner_steps"], final["hypersteps"], final["moved"]) == (60, 12, 12)
    assert final["products"] == sum(row["products"] for row in rows(whole)) == 12 * 5
    assert 0 < final["retrained_test_loss"] < 2.3
    assert "label_smoothing.smoothing" in load_file(whole / "hyperparameters.safetensors")


ON_TWO = (
    "experiment=[]", "name=try", "task=classification", "task.train=90", "task.val=60", "outer=by_constraint",
    "hoptim.recipe.weight_decay.start=0.001", "batch_size=20", "inner_steps=10", "retrain=true",
    "checkpoint_every=1", *QUIET,
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ("val_batch_size=25", "every=10"),  # one hyperstep after the resume, at the last step: only the retraining has it
        ("hoptim/method=unrolled", "hoptim.method.steps=5", "every=33"),  # steps 28 to 33, of which two are saved
    ],
)
def test_two_ranks_resume_to_the_same_bits_each_with_its_own_batches(tmp_path, options):
    check_two_ranks_resume(tmp_path, *ON_TWO, "hoptim/recipe=[weight_decay]", "inner.lr=0.05", *options)


def check_two_ranks_resume(root, *options):
    """A run on two ranks that goes on from its third row ends in the bits of one without a break, the retraining too."""
    whole, parts = root / "whole", root / "parts"
    run_ranks(2, "train.py", f"hydra.run.dir={whole}", *options, "outer_steps=4")
    run_ranks(2, "train.py", f"hydra.run.dir={parts}", *options, "outer_steps=3")
    run_ranks(2, "train.py", f"hydra.run.dir={parts}", *options, "outer_steps=4", "resume=true")
    assert result(whole)["hypersteps"] > 0
    assert result(parts) == result(whole)
    assert [timeless(row) for row in rows(parts)] == [timeless(row) for row in rows(whole)]
    values = [load_file(folder / "hyperparameters.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


@pytest.mark.parametrize(
    "options",
    [  # shards of 17 and 16 rows; and BatchNorm, whose statistics are those of each rank's own batches
        ("task.model_of.hidden=[33]", "inner=adam", "scheduler=cosine", "scheduler.T_max=40", "hoptim/solver=warm_start"),
        ("task/model_of=resnet", "task.model_of.depth=8", "task.model_of.width=3", "inner_steps=3", "every=5"),
    ],
)
def test_a_sharded_run_resumes_to_the_same_bits(tmp_path, options):
    noisy = ("hoptim/recipe=[weight_decay,noise_width]", "val_batch_size=25", "sharded=true")
    check_two_ranks_resume(tmp_path, *ON_TWO, *noisy, *options)


def test_a_sharded_run_and_a_wrapped_one_refuse_each_others_checkpoint(tmp_path):
    options = (f"hydra.run.dir={tmp_path}", *ON_TWO, "hoptim/recipe=[weight_decay]", "outer_steps=1")
    for saved, here in (("true", "false"), ("false", "true")):
        run_ranks(2, "train.py", *options, f"sharded={saved}")
        before = [(tmp_path / name).read_bytes() for name in ("checkpoint.pt", "result.json", "metrics.jsonl")]
        printed = tmp_path / f"resumed{here}.out"
        with torchrun(2, "train.py", *options, f"sharded={here}", "resume=true", files=[printed] * 2) as processes:
            assert 1 in wait_for(processes)
        assert f"is of another run: sharded is {saved} there and {here} here; use resume=false" in printed.read_text()
        assert before == [(tmp_path / name).read_bytes() for name in ("checkpoint.pt", "result.json", "metrics.jsonl")]


def test_a_sharded_model_trains_on_two_ranks_as_a_wrapped_one(tmp_path):
    options = (*ON_TWO, "hoptim/recipe=[weight_decay,noise_width]", "inner.lr=0.05", "outer_steps=2")
    wrapped, sharded = tmp_path / "wrapped", tmp_path / "sharded"
    run_ranks(2, "train.py", f"hydra.run.dir={wrapped}", *options)
    printed = run_ranks(2, "train.py", f"hydra.run.dir={sharded}", *options, "sharded=true")
    assert "sharded=true: this process has 2405 of 4810 weights" in printed
    found, expected = result(sharded), result(wrapped)
    assert found["hypersteps"] == found["moved"] == 2
    for name, figure in expected.items():
        assert found[name] == (pytest.approx(figure, rel=1e-5) if isinstance(figure, float) else figure), name
    for row, other in zip(rows(sharded), rows(wrapped), strict=True):
        assert row["hypergradient_norm"] == pytest.approx(other["hypergradient_norm"], rel=1e-4)
    values = [load_file(folder / "hyperparameters.safetensors") for folder in (wrapped, sharded)]
    assert all(torch.allclose(values[0][name], values[1][name], rtol=1e-5, atol=0) for name in values[0])


def test_a_model_is_sharded_over_several_processes(tmp_path):
    alone = train(f"hydra.run.dir={tmp_path}", *SHORT, *QUIET, "sharded=true", check=False)
    assert alone.returncode
    assert "sharded=true in one process: start several, torchrun --nproc-per-node 2" in alone.stderr


@pytest.mark.skipif(find_spec("hydra_plugins.hydra_submitit_launcher") is None, reason="hydra-submitit-launcher is missing")
def test_a_sweep_by_submitit_is_a_process_for_each_job_and_slurm_takes_the_same_file(tmp_path):
    train("experiment=iris_cluster", f"root={tmp_path}", *SHORT, *QUIET, "seed=0")
    (entry,) = json.loads((tmp_path / "compare.json").read_text()).values()
    assert (entry["runs"], entry["failed"]) == (1, 0)
    assert len(list((tmp_path / ".submitit").glob("*/*_log.out"))) == 1
    slurm = train(
        "experiment=iris_cluster", "hydra/launcher=submitit_slurm", "--cfg", "hydra", "-p", "hydra.launcher"
    ).stdout
    assert "submitit_launcher.SlurmLauncher" in slurm
    assert {"cpus_per_task: 1", "mem_gb: 2", "timeout_min: 60"} <= set(slurm.splitlines())


@pytest.mark.skipif(find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="hydra-optuna-sweeper is missing")
def test_optunas_sweeper_chooses_among_hoptims_own_options(tmp_path):
    train("experiment=iris_optuna", f"root={tmp_path}", *SHORT, *QUIET, "hydra.sweeper.n_trials=3")
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    losses = [result(path.parent)["val_loss"] for path in tmp_path.rglob("result.json")]
    assert len(losses) == 3
    assert best.best_value == min(losses)
    assert set(best.best_params) == {"hoptim.solver.terms", "outer.lr", "every"}


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sweep_with_joblib_is_compared_at_its_end(tmp_path, n_jobs):
    overrides = ("experiment=iris,iris_uniform", "seed=0,1", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={n_jobs}")
    sweep = ("-m", f"root={tmp_path}", *SHORT, *QUIET, *overrides)
    if n_jobs == 1:
        process = train(*sweep)
    else:  # joblib's own processes do not go well with those of multiprocessing
        process = subprocess.run(command(*sweep), cwd=ROOT, env=env(), capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    table = json.loads((tmp_path / "compare.json").read_text())
    assert {entry["runs"] for entry in table.values()} == {2}
    for group, entry in table.items():
        losses = torch.tensor(
            [result(tmp_path / group / f"seed={seed}")["test_loss"] for seed in (0, 1)], dtype=torch.double
        )
        assert entry["test_loss"] == pytest.approx([losses.mean().item(), losses.std().item() / 2**0.5])
    assert "iris_uniform" in process.stdout
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_a_search_is_judged_by_what_validation_would_have_chosen(tmp_path):
    train("-m", f"root={tmp_path}", *SHORT, *QUIET, "experiment=iris_uniform", "task.decay=0.001,0.3", "seed=0,1")
    table = json.loads((tmp_path / "compare.json").read_text())
    (best,) = [entry for label, entry in table.items() if "best of 2 by validation" in label]
    chosen = []
    for seed in (0, 1):
        runs = [result(path.parent) for path in tmp_path.rglob(f"seed={seed}/result.json")]
        chosen.append(min(runs, key=lambda run: run["val_loss"])["test_loss"])
    assert best["test_loss"][0] == pytest.approx(sum(chosen) / 2)
    assert best["trainings"] == pytest.approx(2)


def test_help_helps():
    text = train("--help").stdout
    for words in ("resume=true", "hoptim.solver.terms=5", "task.hidden=1024", "experiment:", "inner_steps: 100"):
        assert words in text


def test_a_training_that_ends_in_nan_fails_and_says_so(tmp_path):
    process = train(f"hydra.run.dir={tmp_path}", *SHORT, *QUIET, "inner.lr=1e6", check=False)
    assert process.returncode == 1
    assert "lower inner.lr" in result(tmp_path)["error"]


def test_a_rerun_that_is_killed_early_does_not_resume_the_run_before_it(tmp_path):
    options = ("inner_steps=2", "task.hidden=16", "outer_steps=3", "checkpoint_every=3", *QUIET)
    train(f"hydra.run.dir={tmp_path}", *options)
    before = result(tmp_path)
    longer = ("outer_steps=300", "checkpoint_every=300")
    process = start("train.py", f"hydra.run.dir={tmp_path}", *options, *longer)
    while (tmp_path / "result.json").exists() or not (tmp_path / "metrics.jsonl").exists():
        assert process.exitcode is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "checkpoint.pt").exists()
    train(f"hydra.run.dir={tmp_path}", *options, "resume=true")
    assert result(tmp_path) == before


def test_a_refused_resume_leaves_the_finished_result_alone(tmp_path):
    train(f"hydra.run.dir={tmp_path}", *SHORT, *QUIET)
    before = result(tmp_path)
    changes = {"threads=2": "of another run", "inner.lr=0.5": "of another run", "outer_steps=2": "past outer_steps=2"}
    for change, words in changes.items():
        process = train(f"hydra.run.dir={tmp_path}", *SHORT, *QUIET, "resume=true", change, check=False)
        assert process.returncode == 1
        assert words in process.stderr
        assert result(tmp_path) == before


def test_runs_of_one_folder_are_told_apart_by_what_they_are(tmp_path):
    for name, seed in (("iris", 0), ("iris_clamp", 0)):
        train(f"hydra.run.dir={tmp_path / name}", f"experiment={name}", f"seed={seed}", *SHORT, *QUIET)
    run("compare.py", tmp_path)
    table = json.loads((tmp_path / "compare.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert {label: entry["runs"] for label, entry in table.items()} == {"iris": 1, "iris_clamp": 1}


def write_result(folder, *, seed, steps, loss, name="toy"):
    """What compare.py reads of a finished run of so many inner steps."""
    folder.mkdir(parents=True)
    row = {
        "outer_step": 1,
        "inner_step": steps,
        "train_loss": loss,
        "val_loss": loss,
        "test_loss": loss,
        "hyperparameters": {},
    }
    (folder / "metrics.jsonl").write_text(json.dumps(row | {"inner_seconds": 1.0, "hyper_seconds": 1.0}) + "\n")
    found = {"status": "finished", "name": name, "seed": seed, "inner_steps": steps, "moved": 1, "hypersteps": 1}
    found |= {f"{part}_loss": loss for part in ("train", "val", "test")}
    (folder / "result.json").write_text(json.dumps(found))


def test_a_run_of_another_length_is_left_out_of_its_row_and_named(tmp_path):
    for seed, (steps, loss) in enumerate(((400, 1.0), (200, 9.0), (400, 3.0))):
        write_result(tmp_path / "toy" / f"seed={seed}", seed=seed, steps=steps, loss=loss)
    process = run("compare.py", tmp_path)
    (entry,) = json.loads((tmp_path / "compare.json").read_text()).values()
    assert (entry["runs"], entry["test_loss"]) == (2, [2.0, 1.0])
    assert "left out: toy seed 1: 200 inner steps, the others of its row 400" in process.stdout


def test_a_search_is_among_rows_of_one_length(tmp_path):
    for group, (steps, loss) in {"lr=1": (400, 2.0), "lr=2": (400, 1.0), "lr=3": (200, 0.5), "lr=4": (200, 0.7)}.items():
        write_result(tmp_path / "toy" / group / "seed=0", seed=0, steps=steps, loss=loss)
    run("compare.py", tmp_path)
    table = json.loads((tmp_path / "compare.json").read_text())
    best = {label: entry["test_loss"][0] for label, entry in table.items() if "best of" in label}
    assert best == {
        "toy (400 steps): best of 2 by validation": 1.0,
        "toy (200 steps): best of 2 by validation": 0.5,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is no folder: give one that has runs in it"),
        (["."], "no result.json below {folder}: run a sweep first"),
        (["toy", "--against", "none"], "against='none' is not a row: the rows are ['.']"),
    ],
)
def test_compare_says_what_is_wrong_with_its_arguments_without_a_traceback(tmp_path, arguments, words):
    folder = tmp_path / arguments[0]
    if arguments[0] == "toy":
        write_result(folder, seed=0, steps=4, loss=1.0)
    process = run("compare.py", folder, *arguments[1:], check=False)
    assert process.returncode != 0
    assert words.format(folder=folder) in process.stderr
    assert "Traceback" not in process.stderr


def test_a_run_without_a_terminal_prints_plain_lines_and_ends_with_where_its_pictures_and_page_are(finished_output):
    folder, lines = finished_output
    own = [line for line in lines if line.startswith("iris seed 0: ")]
    assert [line.split("  ")[0] for line in own[:-1]] == [
        f"iris seed 0: {step} of 12" for step in (2, 3, 4, 5, 6, 8, 9, 10, 11)
    ]
    assert all("train 1." in line or "train 0." in line for line in own)
    assert lines[-2:] == [
        f"pictures: {folder / 'curves.png'}  {folder / 'hyperparameters.png'}",
        f"page: {folder / 'dashboard.html'}",
    ]
    assert '<span class="chip ok">finished</span>' in (folder / "dashboard.html").read_text()


@pytest.fixture
def finished_output(tmp_path):
    """A run of twelve rows, and the lines that it prints into a pipe."""
    options = ("outer_steps=12", "inner_steps=5", "task.hidden=4", "baselines={}", "hoptim/tracker=[]")
    return tmp_path, train(f"hydra.run.dir={tmp_path}", *options).stdout.splitlines()


def test_a_run_in_which_most_hypersteps_fail_says_so_at_its_end(tmp_path):
    options = ("hoptim/solver=neumann", "hoptim/curvature=exact", "hoptim.solver.step_size=1e4", "hoptim.solver.terms=50")
    process = train(f"hydra.run.dir={tmp_path}", *SHORT, *QUIET, *options)
    assert result(tmp_path)["moved"] == 0
    assert re.search("4 of 4 hypersteps failed and moved nothing: .*STEP_TOO_LARGE", process.stdout)
    assert [row["failed"] for row in rows(tmp_path)] == [1, 1, 1, 1]


CLASSES = (
    "experiment=[]", "name=try", "task=classification", "task.train=200", "task.val=100", "outer=by_constraint",
    "hoptim/recipe=[weight_decay]", "batch_size=50", *QUIET,
)  # fmt: skip


def test_epochs_are_passes_over_the_training_data_and_a_run_that_learns_nothing_says_so(tmp_path):
    process = train(f"hydra.run.dir={tmp_path}", *CLASSES, "epochs=2", "inner_steps=3", "every=1000")
    assert [row["inner_step"] for row in rows(tmp_path)] == [3, 6, 8]
    assert result(tmp_path)["hypersteps"] == 0
    assert "every=1000 and warmup=0 leave no hyperstep in 8 inner steps: nothing will be learned" in process.stdout


def test_a_fit_by_folds_goes_on_with_its_own_options_alone(tmp_path):
    folds = (*CLASSES, "folds=2", "outer_steps=4", "inner_steps=20")
    options = (f"hydra.run.dir={tmp_path}", *folds, "resume=true")
    train(*options)
    before = result(tmp_path)
    train(*options, "plots=false", "threads=1")
    assert result(tmp_path) == before
    for change in ("inner.lr=0.5", "outer_steps=5"):
        process = train(*options, change, check=False)
        assert process.returncode == 1
        assert "is of another fit" in process.stderr
    assert result(tmp_path) == before


WRONG = {  # what is said of a number that no run can have, and of what a fit by folds does not do
    "batch_size=0": "batch_size=0: give 1 or more",
    "folds=1": "folds=1: give 2 or more",
    "epochs=0": "epochs=0.0: give a number above 0",
    "hoptim/recipe=[dropout]": "hoptim/recipe=['dropout']: tasks.iris.Iris takes no recipes",
    "learn=false,true folds=2": "folds=2 with learn=false",
}


def test_what_no_run_can_do_is_named_before_it_starts(tmp_path):
    for place, (options, words) in enumerate(WRONG.items()):
        folder = tmp_path / str(place)
        train(f"hydra.run.dir={folder}", *QUIET, *options.replace("false,true", "false").split(), check=False)
        assert words in result(folder)["error"]
        assert not (folder / "config.yaml").exists()
