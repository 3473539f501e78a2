"""Trackers as hooks of a plain training loop; each is read back by the library that it writes for."""

import copy
import json
import math
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from wandb_file import read_finished as read

import hoptim
from hoptim.tracking import Console, JsonLines, MLflow, TensorBoard, WandB

COST = ("products", "hyper_seconds")
METRICS = ("val_loss", "train_loss")
STEPS = ("inner_step", "hyper_step")


def ridge(hook, every=1, decay=0.5, solver=None):
    """One weight, one decay or the mean of several: 0.5·(w − 4)² + 0.5·decay·w², validated at 1."""
    model, hparams = nn.Linear(1, 1, bias=False), hoptim.HyperParameters({"decay": torch.as_tensor(decay).reshape(-1)})
    nn.init.constant_(model.weight, 1.0)
    problem = hoptim.Problem(
        model,
        hparams,
        lambda m, h, x: 0.5 * (m(x) - 4).square().sum() + 0.5 * h["decay"].mean() * m.weight.square().sum(),
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


def expected(row, *, numbers_alone=False):
    """The names under which a row's figures are to be found, each once."""
    found = {"hypergradient/status_level": ["ok", "remark", "failed"].index(hoptim.Status[row["status"]].kind)}
    for key, value in row.items():
        if value is not None and key not in STEPS and not (numbers_alone and isinstance(value, str)):
            section = "cost/" if key in COST else "metrics/" if key in METRICS else "hypergradient/"
            found[("" if key.startswith("hyperparameters/") else section) + key] = float(value) if numbers_alone else value
    return found


def test_json_lines_hold_the_records(tmp_path):
    path, seen = tmp_path / "deep" / "metrics.jsonl", []
    optimizer = ridge(JsonLines(path=path))
    optimizer.hooks += (lambda record: seen.append(record.row()),)
    steps(optimizer, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == seen
    assert [row["hyper_step"] for row in seen] == [1, 2, 3]


def saved(optimizer):
    return optimizer.state_dict(), optimizer.problem.model.state_dict(), optimizer.problem.hparams.state_dict()


def restored(optimizer, states):
    for part, state in zip((optimizer, optimizer.problem.model, optimizer.problem.hparams), states, strict=True):
        part.load_state_dict(state)
    return optimizer


def test_a_new_run_begins_a_new_file_of_json_lines_and_a_resumed_one_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = ridge(JsonLines(path=path), decay=0.5)
    steps(first, 2)
    whole = path.read_text()
    killed = ridge(JsonLines(path=path), decay=0.25)
    steps(killed, 3)
    assert (tmp_path / "rows.jsonl.before").read_text() == whole
    checkpoint = copy.deepcopy(saved(killed))
    steps(killed, 2)
    uninterrupted = [timeless(line) for line in path.read_text().splitlines()]
    with open(path, "a") as file:
        file.write('{"hyper_step": 6, "val')  # the kill came in the middle of this row
    resumed = restored(ridge(JsonLines(path=path), decay=0.25), checkpoint)
    steps(resumed, 2)
    rows = [timeless(line) for line in path.read_text().splitlines()]
    assert rows == uninterrupted
    assert [row["hyper_step"] for row in rows] == [1, 2, 3, 4, 5]


def timeless(line):
    return {key: value for key, value in json.loads(line).items() if key != "hyper_seconds"}


def test_json_lines_that_fail_stop_no_training(tmp_path):
    (tmp_path / "rows.jsonl").write_text("no JSON\n")
    optimizer = ridge(JsonLines(path=tmp_path / "rows.jsonl"))
    restored(optimizer, saved(trained(1)))
    with pytest.warns(UserWarning, match=r"JsonLines failed: JSONDecodeError.*training goes on"):
        steps(optimizer, 1)
    assert optimizer.record.moved


def trained(count):
    optimizer = ridge(lambda record: None)
    steps(optimizer, count)
    return optimizer


def test_a_record_is_printed_as_a_paragraph_that_ends_with_the_hyperparameters():
    optimizer = ridge(lambda record: None, decay=torch.linspace(0.0, 1.0, 20))
    steps(optimizer, 2)
    record, row = optimizer.record, optimizer.record.row()
    value = record.hyperparameters["decay"]
    assert (
        repr(record)
        == str(record)
        == (
            f"Hyperstep 2 after 2 inner steps: FINISHED, residual {row['residual']:.2g}, {row['products']} products, "
            f"{record.seconds:.3g} s. "
            f"Training loss {record.result.train_loss:.4f}, validation loss {record.result.val_loss:.4f}. "
            f"Hyperparameters: decay of 20: mean {value.mean():.4g}, {value.min():.4g} to {value.max():.4g}."
        )
    )
    with pytest.warns(UserWarning, match="STEP_TOO_LARGE"):
        steps(failing := ridge(lambda record: None, solver=hoptim.Neumann(terms=50, step_size=5.0)), 1)
    assert "Hyperparameters: decay 0.5. It moved nothing: the series diverged" in str(failing.record)


def test_console_shows_the_values_and_never_breaks_its_line(capsys):
    optimizer = ridge(Console(), decay=torch.tensor([0.2, 0.3, 0.5]))
    steps(optimizer, 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    shown = ", ".join(f"{value:.4g}" for value in optimizer.record.hyperparameters["decay"].tolist())
    assert lines[-1].startswith("step 2  val ")
    assert lines[-1].endswith(f"FINISHED: decay ({shown})")


@pytest.mark.parametrize("kind", [Console, JsonLines])
def test_a_closed_terminal_or_a_folder_in_the_way_stops_no_training(tmp_path, monkeypatch, kind):
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "closed", "w") as closed:
        pass
    monkeypatch.setattr(sys, "stdout", closed)
    optimizer = ridge(kind(**({"path": tmp_path / "folder"} if kind is JsonLines else {})))
    with pytest.warns(UserWarning, match=f"{kind.__name__} failed: .*; training goes on without it"):
        steps(optimizer, 1)
    assert optimizer.record.moved


def test_console_prints_one_line_and_what_to_do_after_a_failure(capsys):
    steps(ridge(Console()), 1)
    assert "FINISHED" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="STEP_TOO_LARGE"):
        steps(ridge(Console(), solver=hoptim.Neumann(terms=50, step_size=5.0)), 1)
    assert "Take a smaller step_size" in " ".join(capsys.readouterr().out.split())


def test_wandb_hook_logs_each_figure_of_a_hyperstep_once_and_defines_its_axis(tmp_path, monkeypatch):
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
    last = {name: value for name, value in run["history"][-1].items() if "/" in name}
    assert last == expected(optimizer.record.row())
    assert last["hyperparameters/decay"] == optimizer.record.hyperparameters["decay"].item() != 0.5
    axes = {
        "metrics": "inner_step",
        **dict.fromkeys(("hypergradient", "cost", "hyperparameters", "histograms"), "outer_step"),
    }
    assert {section: run["axes"][f"{section}/*"] for section in axes} == axes


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
    assert (run["project"], run["axes"]["hypergradient/*"]) == ("own", "outer_step")
    assert len(run["history"]) == 2


def test_wandb_that_fails_in_mid_run_stops_no_training(tmp_path):
    import wandb

    optimizer = ridge(WandB(directory=tmp_path, mode="offline"))
    steps(optimizer, 1)
    wandb.finish()
    with pytest.warns(UserWarning, match=r"WandB failed: UsageError.*training goes on without it"):
        steps(optimizer, 1)
    assert (optimizer.record.moved, optimizer.record.hyper_step) == (True, 2)


def test_an_empty_wandb_mode_is_offline_and_so_is_a_wrong_one_with_a_warning(tmp_path, monkeypatch):
    for folder, mode in (("empty", ""), ("wrong", "offlin")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv("WANDB_MODE", mode)
        tracker = WandB(directory=tmp_path / folder)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(ridge(tracker), 1)
        tracker.finish()
        (written,) = tmp_path.glob(f"{folder}/wandb/offline-run-*")
        told = [str(one.message) for one in caught if "W&B" in str(one.message)]
        assert all("did not start in mode 'offlin'" in words and f"wandb sync {written}" in words for words in told)
        assert len(told) == bool(mode)


ULP = 2.0**-23


def one_ulp_apart(dtype):
    return torch.tensor([0.5, math.nextafter(0.5, 1.0) if dtype is torch.float64 else 0.5 + ULP / 2], dtype=dtype).repeat(10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_that_are_one_ulp_apart_have_a_histogram_on_wandb(tmp_path, dtype, recwarn):
    tracker, value = WandB(directory=tmp_path, mode="offline"), one_ulp_apart(dtype)
    assert value.unique().numel() == 2
    tracker.log({"inner_step": 1, "val_loss": 0.25}, {"decay": value, "same": torch.full((20,), 0.1), "mix": torch.ones(12)})
    tracker.finish()
    (row,) = read(next(iter(tmp_path.glob("wandb/offline-run-*/*.wandb"))))["history"]
    assert row["metrics/val_loss"] == 0.25
    counts = row["histograms/decay/values"]
    assert (len(counts), sum(counts)) == (64, 20)
    assert counts[0] == counts[-1] == 10 or dtype is torch.float64, "these are told apart; in float64 there is no room"
    assert sum(row["histograms/same/values"]) == 20
    edges = row["histograms/same/bins"]
    assert edges[0] < 0.1 < edges[-1] < 0.1001
    assert not [name for name in row if "mix" in name], "a small one has no histogram"
    assert not [str(one.message) for one in recwarn if "WandB" in str(one.message)]


MIX, LARGE = torch.tensor([0.2, 0.3, 0.5]), torch.linspace(0.0, 1.0, 101) ** 2
SUMMARY = {"mean": LARGE.mean(), **{key: LARGE.quantile(q) for key, q in {"min": 0, "quantile_0.05": 0.05, "median": 0.5,
    "quantile_0.95": 0.95, "max": 1}.items()}}  # fmt: skip
NAMED = {f"hyperparameters/decay/{place}": float(value) for place, value in enumerate(MIX)}
NAMED_LARGE = {f"hyperparameters/decay/{key}": float(value) for key, value in SUMMARY.items()}


@pytest.mark.parametrize(("value", "named"), [(MIX, NAMED), (LARGE, NAMED_LARGE)])
def test_small_hyperparameters_are_lines_by_name_and_large_ones_quantiles(tmp_path, store, events, value, named):
    """The same names in all trackers; only large ones have histograms. At the first hyperstep the rate is zero."""
    uri, client = store
    trackers = [WandB(directory=tmp_path, mode="offline"), TensorBoard(directory=tmp_path), MLflow(uri=uri)]
    optimizer = ridge(JsonLines(path=tmp_path / "rows.jsonl"), decay=value)
    optimizer.hooks += tuple(trackers)
    optimizer.outer.param_groups[0]["lr"] = 0.0
    steps(optimizer, 1)
    for tracker in trackers:
        tracker.finish()
    (wandb_row,) = read(next(iter(tmp_path.glob("wandb/offline-run-*/*.wandb"))))["history"]
    board, run = events(tmp_path / "tensorboard"), only_run(client)
    rows = [json.loads((tmp_path / "rows.jsonl").read_text()), wandb_row, run.data.metrics]
    rows += [{tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}]
    for row in rows:
        assert {key: row[key] for key in row if key.startswith("hyperparameters/")} == pytest.approx(named)
    large = len(value) > 12
    assert board.Tags()["histograms"] == ["histograms/decay"] * large
    assert [key for key in wandb_row if key == "histograms/decay/values"] == ["histograms/decay/values"] * large


WEIRD = [
    torch.full((20,), math.nan),
    torch.tensor([1.0, math.inf] * 10),
    torch.full((20,), 1e38),
    torch.zeros(20),
    torch.ones(0),
]


@pytest.mark.parametrize("value", WEIRD)
def test_no_value_of_a_hyperparameter_costs_a_row(tmp_path, store, events, value, recwarn):
    uri, client = store
    trackers = [WandB(directory=tmp_path, mode="offline"), TensorBoard(directory=tmp_path), MLflow(uri=uri)]
    for tracker in trackers:
        tracker.log({"inner_step": 1, "val_loss": 0.25}, {"decay": value})
        tracker.finish()
    (row,) = read(next(iter(tmp_path.glob("wandb/offline-run-*/*.wandb"))))["history"]
    finite = int(value.isfinite().sum())
    assert sum(row.get("histograms/decay/values", [])) == finite
    board = events(tmp_path / "tensorboard")
    assert sum(board.Histograms("histograms/decay")[0].histogram_value.bucket) == finite if finite else True
    assert (
        row["metrics/val_loss"]
        == scalars(board, "metrics/val_loss")[0][1]
        == only_run(client).data.metrics["metrics/val_loss"]
    )
    assert not [str(one.message) for one in recwarn if "failed" in str(one.message)]


def test_a_run_that_is_continued_in_the_same_process_has_its_axes_again(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        tracker = WandB(id="again", directory=folder)
        steps(ridge(tracker), 1)
        tracker.finish()
        run = read(next(iter(folder.glob("wandb/offline-run-*/*.wandb"))))
        assert (run["id"], run["axes"]["hypergradient/*"]) == ("again", "outer_step")


def test_wandb_runs_are_grouped_and_tagged_and_a_long_tag_is_cut(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = WandB(directory=tmp_path, group="sweep", job_type="iris/terms=5", tags=["iris", "x" * 100])
    steps(ridge(tracker), 1)
    tracker.finish()
    run = read(next(iter(tmp_path.glob("wandb/offline-run-*/*.wandb"))))
    assert (run["group"], run["job_type"], sorted(run["tags"])) == ("sweep", "iris/terms=5", ["iris", "x" * 64])


@pytest.fixture
def events():
    """A reader of TensorBoard's files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def reader(folder):
        everything = dict.fromkeys((accumulator.SCALARS, accumulator.HISTOGRAMS, accumulator.IMAGES, accumulator.TENSORS), 0)
        return accumulator.EventAccumulator(str(folder), size_guidance=everything).Reload()

    return reader


def scalars(read, tag):
    return [(event.step, event.value) for event in read.Scalars(tag)]


def test_tensorboard_shows_the_records(tmp_path, events):
    tracker, seen = TensorBoard(directory=tmp_path), []
    tracker.start({"task": {"hidden": 16}, "name": "ridge"})
    optimizer = ridge(tracker, every=2, decay=torch.linspace(0.1, 1.0, 20))
    optimizer.hooks += (lambda record: seen.append(record.row()),)
    steps(optimizer, 6)
    picture(tmp_path / "curves.png")
    tracker.finish({"answer": 42}, {"plots/curves": tmp_path / "curves.png"})
    read = events(tmp_path / "tensorboard")
    for tag in expected(seen[-1], numbers_alone=True):
        rows = [expected(row, numbers_alone=True) for row in seen]
        wanted = [(row["inner_step"], named[tag]) for row, named in zip(seen, rows, strict=True) if tag in named]
        assert scalars(read, tag) == [(step, pytest.approx(value)) for step, value in wanted]
    assert set(read.Tags()["scalars"]) == set(expected(seen[-1], numbers_alone=True)), "each figure once, and no other"
    histograms = read.Histograms("histograms/decay")
    assert [histogram.step for histogram in histograms] == [2, 4, 6]
    value, last = optimizer.record.hyperparameters["decay"], histograms[-1].histogram_value
    assert (last.num, last.min, last.max) == (20, pytest.approx(value.min().item()), pytest.approx(value.max().item()))
    (image,) = read.Images("plots/curves")
    assert (image.width, image.height) == (3, 2)
    assert b"42" in read.Tensors("summary/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_compares_runs_by_their_config_and_the_metrics_that_they_have(tmp_path, events):
    tracker = TensorBoard(directory=tmp_path)
    tracker.start({"task": {"hidden": 16}, "name": "ridge"})
    steps(ridge(tracker), 1)
    tracker.finish()
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    contents = events(tmp_path / "tensorboard").summary_metadata
    parsed = {
        tag: plugin.HParamsPluginData.FromString(data.plugin_data.content)
        for tag, data in contents.items()
        if "hparams" in tag
    }
    found = parsed["_hparams_/session_start_info"].session_start_info.hparams
    assert (found["task.hidden"].number_value, found["name"].string_value) == (16, "ridge")
    metrics = {info.name.tag for info in parsed["_hparams_/experiment"].experiment.metric_infos}
    assert metrics == {"metrics/train_loss", "metrics/val_loss"}


def test_a_run_that_goes_on_has_no_row_twice_in_tensorboard(tmp_path, events):
    killed = ridge(TensorBoard(directory=tmp_path))
    steps(killed, 3)
    checkpoint = killed.state_dict(), killed.problem.model.state_dict()
    steps(killed, 2)  # after its checkpoint, and then it is killed
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which have the second
    resumed = ridge(TensorBoard(directory=tmp_path))
    resumed.load_state_dict(checkpoint[0])
    resumed.problem.model.load_state_dict(checkpoint[1])
    steps(resumed, 4)
    read = events(tmp_path / "tensorboard")
    assert [step for step, _ in scalars(read, "metrics/val_loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in scalars(read, "hyperparameters/decay")] == [1, 2, 3, 4, 5, 6, 7]


def picture(path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (3, 2)).save(path)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """An empty database of MLflow's, which takes seconds to make."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    """The address of a database of this test's own, and a client that reads it."""
    import mlflow

    monkeypatch.chdir(tmp_path)  # where MLflow keeps the files of artifacts
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    return uri, mlflow.MlflowClient(uri)


def only_run(client, project="hoptim"):
    (run,) = client.search_runs([client.get_experiment_by_name(project).experiment_id])
    return run


def history(client, run, key):
    return [
        (metric.step, metric.value)
        for metric in sorted(client.get_metric_history(run.info.run_id, key), key=lambda m: m.step)
    ]


def test_mlflow_shows_the_records(store, tmp_path, monkeypatch):
    uri, client = store
    tracker = MLflow(uri=uri, project="mine", name="first", group="sweep", job_type="iris", tags=["seed=0", "fast"])
    tracker.start({"task": {"hidden": 16}})
    seen, optimizer = [], ridge(tracker, every=2)
    optimizer.hooks += (lambda record: seen.append(record.row()),)
    steps(optimizer, 6)
    (tmp_path / "learned.txt").write_text("0.5")
    picture(tmp_path / "curves.png")
    files = {"hyperparameters": [tmp_path / "learned.txt"]}
    tracker.finish({"answer": 42}, {"plots/curves": tmp_path / "curves.png"}, files)
    run = only_run(client, "mine")
    assert (run.info.run_name, run.info.status, run.data.params) == ("first", "FINISHED", {"task.hidden": "16"})
    assert {"group": "sweep", "job_type": "iris", "seed": "0", "fast": "true"}.items() <= run.data.tags.items()
    names = set(expected(seen[-1], numbers_alone=True))
    assert set(run.data.metrics) == names | {"inner_step", "outer_step"}
    for name in names:
        rows = [(row["inner_step"], expected(row, numbers_alone=True)) for row in seen]
        assert history(client, run, name) == [(step, row[name]) for step, row in rows if name in row]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # older versions download from there alone
    for path, text in (("hyperparameters/learned.txt", "0.5"), ("summary.json", None), ("pictures/curves.png", None)):
        read = Path(client.download_artifacts(run.info.run_id, path, str(tmp_path)))
        assert read.stat().st_size > 0
        assert text in (None, read.read_text() if text else None)


def test_mlflow_shows_hyperparameters_whose_names_are_no_paths(store):
    """MLflow refuses the whole row of a name that it would read as another path."""
    uri, client = store
    tracker = MLflow(uri=uri)
    named = {"hyperparameters/lower//upper": 0.5, "hyperparameters//first": 0.25, "hyperparameters/last/": 0.125}
    tracker.log({"inner_step": 1, "hyper_step": 1, **named})
    tracker.finish()
    found = only_run(client).data.metrics
    assert {name: found[name] for name in found if name.startswith("hyperparameters")} == {
        "hyperparameters/lower/upper": 0.5,
        "hyperparameters/first": 0.25,
        "hyperparameters/last": 0.125,
    }


def test_a_run_that_goes_on_has_no_row_twice_in_mlflow(store):
    uri, client = store
    first = MLflow(uri=uri)
    killed = ridge(first)
    steps(killed, 3)
    checkpoint = killed.state_dict(), killed.problem.model.state_dict()
    steps(killed, 2)
    second = MLflow(uri=uri, id=first.run_id)
    resumed = ridge(second)
    resumed.load_state_dict(checkpoint[0])
    resumed.problem.model.load_state_dict(checkpoint[1])
    steps(resumed, 4)
    second.finish()
    assert [step for step, _ in history(client, only_run(client), "metrics/val_loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_mlflow_logs_into_the_run_that_the_user_has_started(store):
    import mlflow

    uri, client = store
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        mlflow.set_experiment("own")
        with mlflow.start_run():
            tracker = MLflow()
            steps(ridge(tracker), 1)
            tracker.abandon()
    finally:
        mlflow.set_tracking_uri(before)
    assert "metrics/val_loss" in only_run(client, "own").data.metrics


def test_a_server_of_mlflow_that_is_gone_is_warned_of_once_and_stops_no_training(monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MLflow(uri="http://127.0.0.1:9")
    optimizer = ridge(tracker)
    with pytest.warns(UserWarning, match="MLflow failed"):
        steps(optimizer, 1)
    with warnings.catch_warnings(record=True) as caught:
        steps(optimizer, 2)
        tracker.finish()
    assert (optimizer.record.moved, optimizer.record.hyper_step) == (True, 3)
    assert not [warning for warning in caught if "MLflow" in str(warning.message)]


def test_a_folder_that_tensorboard_cant_write_stops_no_training(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    optimizer = ridge(TensorBoard(directory=tmp_path / "file"))
    with pytest.warns(UserWarning, match="TensorBoard failed"):
        steps(optimizer, 1)
    assert optimizer.record.moved


@pytest.mark.parametrize(("kind", "package"), [(TensorBoard, "tensorboard"), (MLflow, "mlflow")])
def test_a_package_that_is_missing_is_reported_before_the_training(monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"in a checkout of hoptim, pip install '\.\[{package}\]'"):
        kind()


def test_only_the_first_rank_logs(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from hoptim.tracking import board

    monkeypatch.setattr(board, "is_first", lambda: False)
    steps(ridge(TensorBoard(directory=tmp_path)), 1)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_is_missing_closes_the_run_all_the_same(tmp_path, store, events):
    import wandb

    uri, client = store
    for tracker in (WandB(directory=tmp_path, mode="offline"), TensorBoard(directory=tmp_path), MLflow(uri=uri)):
        steps(ridge(tracker), 1)
        with pytest.warns(UserWarning, match=f"{type(tracker).__name__} failed: .*nowhere.png.*training goes on") as caught:
            tracker.finish({"answer": 42}, {"plots/curves": tmp_path / "nowhere.png"})
        assert len(caught) == 1
    assert wandb.run is None
    run = read(next(iter(tmp_path.glob("wandb/offline-run-*/*.wandb"))))
    assert (run["exit"], run["summary"]["answer"], only_run(client).info.status) == (0, 42, "FINISHED")


def test_a_row_of_several_hypersteps_shows_the_worst_of_their_statuses(tmp_path):
    tracker = WandB(directory=tmp_path, mode="offline")
    for step, statuses in enumerate(
        ({"FINISHED": 9, "STEP_TOO_LARGE": 1}, {"FINISHED": 1, "INEXACT": 1}, {"FINISHED": 1}), 1
    ):
        tracker.log({"inner_step": step, "outer_step": step, "status": "FINISHED", "statuses": statuses})
    tracker.finish()
    run = read(next(iter(tmp_path.glob("wandb/offline-run-*/*.wandb"))))
    assert [row["hypergradient/status_level"] for row in run["history"]] == [2, 1, 0]
