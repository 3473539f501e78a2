"""Dashboards: the page in a real browser, and the workspace and the report against what a run has really logged."""

import json
import math
import re

import browser
import pytest
import torch
import workspace_job
from jobs import ROOT, result, rows, run, train
from safetensors.torch import save_file
from wandb_file import read_finished

pytest.importorskip("plotly")
SHORT = ("outer_steps=4", "inner_steps=20", "task.hidden=16", "plots=false", "hoptim/tracker=[wandb]")
in_browser = pytest.mark.skipif(browser.FOUND is None, reason=browser.MISSING)


def dashboard(*arguments):
    """As scripts/dashboard with these arguments; what it prints."""
    return run("tasks/dashboards/build.py", *arguments).stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run, with its W&B run."""
    folder = tmp_path_factory.mktemp("finished")
    train(f"hydra.run.dir={folder}", *SHORT)
    return folder


@pytest.fixture(scope="module")
def page(finished):
    """The page about it, as a browser shows it."""
    dashboard(finished)
    return browser.opened(finished / "dashboard.html") if browser.FOUND else None


def line(chart, name):
    (found,) = [line for line in chart["lines"] if line["name"] == name]
    return dict(zip(found["x"], found["y"], strict=True))


@in_browser
def test_the_page_of_a_run_draws_the_figures_in_its_files(page, finished):
    assert (page["failures"], page["loaded"]) == ([], [])
    wanted = {
        ("Loss", "train", "inner_step"): "train_loss",
        ("Loss", "validation", "inner_step"): "val_loss",
        ("Loss", "test", "inner_step"): "test_loss",
        ("Accuracy", "test", "inner_step"): "test_accuracy",
        ("Residual of the solve", "‖g − Aᵀx‖ / ‖g‖", "outer_step"): "residual",
        ("Cosine to the last hypergradient", "cosine", "outer_step"): "cosine_to_last",
        ("Norms of the hypergradient", "indirect", "outer_step"): "indirect_norm",
        ("Seconds of each outer step", "training", "outer_step"): "inner_seconds",
        ("Products of each outer step", "products with A", "outer_step"): "products",
        ("Hypersteps of each outer step", "all", "outer_step"): "hypersteps",
        ("Hypersteps of each outer step", "failed", "outer_step"): "failed",
    }
    for (title, name, axis), key in wanted.items():
        expected = {row[axis]: row[key] for row in rows(finished) if row[key] is not None}
        assert line(page["charts"][title], name) == pytest.approx(expected), title
    for chart in page["charts"].values():
        assert chart["height"] > 200
        assert chart["marks"] > 0
    assert set(page["charts"]["Loss"]["axes"]) == {"inner steps", "loss"}
    assert page["charts"]["Loss"]["legend"] == ["train", "validation", "test"]


@in_browser
def test_the_page_of_a_run_shows_its_hyperparameters_over_time_and_their_histogram_at_the_end(page, finished):
    for name, entries in {"0.weight": 4 * 16, "3.weight": 16 * 16, "6.weight": 16 * 3}.items():
        chart = page["charts"][name]
        medians = {row["outer_step"]: row["hyperparameters"][name]["quantiles"][3] for row in rows(finished)}
        assert line(chart, "median") == pytest.approx(medians)
        (histogram,) = [line for line in chart["lines"] if line["name"] == "at the end"]
        assert sum(histogram["x"]) == entries


def write_run(folder, *, seed=0, losses=(0.5, 0.4), statuses=("FINISHED", "FINISHED"), name="toy", **changes):
    """The files of a run, as scripts/train.py writes them, with these figures."""
    folder.mkdir(parents=True)
    found = []
    for step, (loss, status) in enumerate(zip(losses, statuses, strict=True), start=1):
        spread = {"mean": loss, "min": loss, "max": loss, "quantiles": [loss] * 7}
        found.append({
            "outer_step": step, "inner_step": 10 * step, "train_loss": loss, "val_loss": 2 * loss, "test_loss": 3 * loss,
            "test_accuracy": 0.5, "status": status, "moved": status == "FINISHED", "detail": "", "products": 4,
            "residual": 0.1, "hyper_seconds": 0.5, "inner_seconds": 1.0, "hyperparameters/decay": loss,
            "hyperparameters": {"decay": spread},
        })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    last = {key: found[-1][key] for key in ("train_loss", "val_loss", "test_loss", "test_accuracy")}
    ends = {status: statuses.count(status) for status in statuses}
    moved = sum(row["moved"] for row in found)
    whole = {"status": "finished", "name": name, "seed": seed, "statuses": ends, "moved": moved, "hypersteps": 2, **last}
    (folder / "result.json").write_text(json.dumps({**whole, **changes}))
    (folder / "config.yaml").write_text(f"name: {name}\nseed: {seed}\nouter: {{lr: {losses[0]}}}\n")
    save_file({"decay": torch.tensor(losses[-1])}, folder / "hyperparameters.safetensors")


@in_browser
def test_a_failed_solve_is_red_and_the_page_says_what_to_do(tmp_path):
    folder = tmp_path / "run"
    write_run(
        folder, statuses=("NEGATIVE_CURVATURE", "STEP_TOO_LARGE"), status="failed", error="FloatingPointError: <lower lr>"
    )
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"outer_step": 3, "train_l')  # the run goes on, and is writing this row
    dashboard(folder)
    page = browser.opened(folder / "dashboard.html")
    chart = page["charts"]["Status of each solve"]
    ends = {line["name"]: (line["x"], line["y"], line["colour"]) for line in chart["lines"]}
    order = chart["lines"][0]["categories"]
    assert ends == {
        "remark": ([1], [order.index("NEGATIVE_CURVATURE")], "#c9860a"),
        "failed": ([2], [order.index("STEP_TOO_LARGE")], "#c53030"),
    }
    assert page["failures"] == []
    text = re.sub(r"<script>.*?</script>", "", page["text"], flags=re.DOTALL)
    for words in ("Take a smaller step_size", "FloatingPointError: <lower lr>", '<span class="chip failed">failed</span>'):
        assert words in text


def write_long_rows(folder, failed, **changes):
    """A run of seven rows and 61 hypersteps: none in the first, then ten, in the last eleven; how many fail in each row."""
    write_run(folder, losses=(0.5,) * 7, statuses=("FINISHED",) * 7)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for number, (row, lost) in enumerate(zip(rows, failed, strict=True)):
        count = (0, 10, 10, 10, 10, 10, 11)[number]
        row |= {"hypersteps": count, "moved": count - lost, "failed": lost, "products": 5 * count}
        row["statuses"] = {key: many for key, many in {"STEP_TOO_LARGE": lost, "FINISHED": count - lost}.items() if many}
        row |= {f"hyperparameters/mix/{place}": 0.1 * place + 0.01 * number for place in range(3)}
        row["hyperparameters"]["mix"] = row["hyperparameters"]["decay"]
        if not count:
            del row["status"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = json.loads((folder / "result.json").read_text())
    found |= {"moved": 61 - sum(failed), "hypersteps": 61, "statuses": {"STEP_TOO_LARGE": sum(failed)}, **changes}
    (folder / "result.json").write_text(json.dumps(found))
    return rows


def words_of(page):
    return re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL))


@pytest.mark.parametrize(
    ("failed", "chip", "tile"),
    [
        ((0,) * 7, '<span class="chip ok">finished</span>', "61 of 61"),
        ((0, 3, 0, 0, 0, 0, 0), '<span class="chip remark">finished, 3 of 61 hypersteps failed</span>', "58 of 61"),
        ((0, 10, 10, 10, 10, 10, 11), '<span class="chip failed">finished, 61 of 61 hypersteps failed</span>', "0 of 61"),
    ],
)
def test_the_page_counts_hypersteps_and_not_rows_and_hides_no_failure(tmp_path, failed, chip, tile):
    write_long_rows(tmp_path / "run", failed, retrained_test_loss=0.4321, retrained_test_accuracy=0.875)
    dashboard(tmp_path / "run")
    page = tmp_path / "run" / "dashboard.html"
    assert chip in page.read_text()
    shown = " ".join(words_of(page).split())
    assert f"{tile} hypersteps that moved" in shown
    assert "305 (5 each) products" in shown
    assert "0.4321 test loss after retraining 0.8750 test accuracy after retraining" in shown
    table = {status: f"{count} the series diverged" for status, count in {"STEP_TOO_LARGE": sum(failed)}.items() if count}
    assert all(f"failed {status} {words}" in shown for status, words in table.items())
    assert ("STEP_TOO_LARGE" in shown) == bool(table)


@in_browser
def test_the_page_shows_failures_between_rows_and_a_line_for_each_number_of_a_small_hyperparameter(tmp_path):
    rows = write_long_rows(tmp_path / "run", (0, 3, 0, 0, 0, 0, 2))
    dashboard(tmp_path / "run")
    charts = browser.opened(tmp_path / "run" / "dashboard.html")["charts"]
    failures = [line for line in charts["Status of each solve"]["lines"] if line["name"] == "failed"]
    assert [line["x"] for line in failures] == [[2, 7]]
    assert line(charts["Hypersteps of each outer step"], "failed") == {1: 0, 2: 3, 3: 0, 4: 0, 5: 0, 6: 0, 7: 2}
    for place in range(3):
        values = {row["outer_step"]: row[f"hyperparameters/mix/{place}"] for row in rows}
        assert line(charts["mix"], f"mix[{place}]") == pytest.approx(values)
    assert len(charts["mix"]["lines"]) == 3


@in_browser
def test_the_page_of_a_sweep_compares_means_and_errors_of_its_settings(tmp_path):
    for group, shift in {"toy/lr=1": 0.0, "toy/lr=2": 1.0}.items():
        for seed, loss in enumerate((0.2, 0.4, 0.6)):
            write_run(tmp_path / group / f"seed={seed}", seed=seed, losses=(1.0, loss + shift))
    write_run(tmp_path / "toy/lr=3/seed=0", status="failed", error="ValueError: no")
    dashboard(tmp_path)
    page = browser.opened(tmp_path / "dashboard.html")
    assert (page["failures"], page["loaded"]) == ([], [])
    for name, mean in {"lr=1": 1.2, "lr=2": 4.2}.items():
        assert line(page["charts"]["Loss: test"], name) == pytest.approx({10: 3.0, 20: mean})
        assert line(page["charts"]["decay"], name) == pytest.approx({1: 1.0, 2: mean / 3})
        (reached,) = [line for line in page["charts"]["Final test loss"]["lines"] if line["name"] == name]
        assert reached["x"] == pytest.approx([mean - 0.6, mean, mean + 0.6])
    lower, upper = [line for line in page["charts"]["Loss: test"]["lines"] if "trace" in line["name"]][:2]
    assert [upper["y"][1] - 1.2, 1.2 - lower["y"][1]] == pytest.approx([0.6 / math.sqrt(3)] * 2)
    costs = [cost for line in page["charts"]["Cost and test loss"]["lines"] for cost in line["x"]]
    assert costs == pytest.approx([1.5] * 6)
    text = re.sub(r"<script>.*?</script>", "", page["text"], flags=re.DOTALL)
    assert "1.200 ± 0.346" in text
    assert "ValueError: no" in text
    assert "7 runs of 3 settings" in text


def test_the_page_holds_plotly_itself_and_names_no_other_place(finished):
    dashboard(finished, "--output", finished / "other.html")
    text = (finished / "other.html").read_text()
    tags = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in tags
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?!data:)', text)
    assert "plotly.js v" in text


def panels(definition):
    """Each panel of a workspace or a report: its section, kind and config."""
    if "section" in definition:
        for section in definition["section"]["panelBankConfig"]["sections"]:
            for panel in section["panels"]:
                yield section["name"], panel["viewType"], panel["config"]
    title = ""
    for block in definition.get("blocks", ()):
        if block["type"] == "heading":
            title = block["children"][0]["text"]
        elif block["type"] == "panel-grid":
            for panel in block["metadata"]["panelBankSectionConfig"]["panels"]:
                yield title, panel["viewType"], panel["config"]


@pytest.fixture(scope="module")
def logged(finished):
    """The W&B run, read back."""
    (path,) = finished.glob("wandb/offline-run-*/*.wandb")
    return read_finished(path)


def names_in(config):
    """The names of logged figures that a panel asks for."""
    found = [*config.get("metrics", ()), *filter(None, [config.get("xAxis")] if "metrics" in config else [])]
    asked = [column["accessor"] for column in config.get("columns", ())]
    asked += [config[axis] for axis in ("xAxis", "yAxis") if "metrics" not in config and axis in config]
    return found + [name.removeprefix("summary:") for name in asked if name.startswith("summary:")]


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_the_panels_for_wandb_ask_for_what_a_run_has_logged(finished, logged, kind):
    pytest.importorskip("wandb_workspaces")
    report = ["--report"] if kind == "report" else []
    shown = dashboard(finished, "--wandb", "me/hoptim", "--group", "study", "--dry-run", *report)
    found = list(panels(json.loads(shown)))
    sections = ["Losses", "Hypergradients", "Cost", "Hyperparameters over time", "Comparison of a sweep", "Pictures"]
    assert list(dict.fromkeys(section for section, _, _ in found)) == sections
    history = {name.removesuffix("/_type") for row in logged["history"] for name in row}
    for _, view, config in found:
        asked = names_in(config)
        assert asked or view in ("Run Comparer", "Media Browser"), config
        assert set(asked) <= history, config
    every = {name for _, _, config in found for name in names_in(config)}
    health = {"status_level", "residual", "cosine_to_last", "hypergradient_norm"}
    assert {f"hypergradient/{name}" for name in health} | {"cost/products", "cost/hyper_seconds"} <= every
    assert {f"histograms/{name}" for name in ("0.weight", "3.weight", "6.weight")} <= every
    assert "hyperparameters/0.weight/median" in every
    assert '"value": "study"' in shown


def test_the_panels_for_any_run_name_figures_that_hoptim_logs(logged):
    pytest.importorskip("wandb_workspaces")
    found = list(panels(json.loads(dashboard("--wandb", "me/hoptim", "--dry-run"))))
    history = {name for row in logged["history"] for name in row}
    rare = {"hypergradient/standard_error", "hypergradient/step_size"}  # of several validation losses, and of Neumann
    assert {name for _, _, config in found for name in names_in(config)} - history == rare
    (pattern,) = {config["metricRegex"] for _, _, config in found if "metricRegex" in config}
    medians = {f"hyperparameters/{name}/median" for name in ("0.weight", "3.weight", "6.weight")}
    assert {name for name in history if re.fullmatch(pattern, name)} == medians


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_what_a_dry_run_prints_is_what_is_sent(kind):
    """The library's own call to W&B's server, with the server taken away."""
    pytest.importorskip("wandb_workspaces")
    words = ("--wandb", "me/hoptim", *(["--report"] if kind == "report" else []))
    process = run(workspace_job.__file__, *words)
    if process.stdout.startswith("another way"):
        pytest.skip("this version of wandb-workspaces sends in another way")
    (sent,) = [json.loads(line) for line in process.stdout.splitlines() if '"entityName"' in line]
    assert (sent["entityName"], sent["projectName"]) == ("me", "hoptim")
    assert sent["type"] == {"workspace": "project-view", "report": "runs"}[kind]
    printed = dashboard(*words, "--dry-run")
    ours, theirs = (
        re.sub(r'"(id|ref|__id__)": "[^"]*"', "", json.dumps(json.loads(text))) for text in (printed, sent["spec"])
    )
    assert ours == theirs


def test_settings_that_differ_in_a_sweep_are_compared(tmp_path):
    pytest.importorskip("wandb_workspaces")
    for seed, loss in enumerate((0.2, 0.4)):
        write_run(tmp_path / f"seed={seed}", seed=seed, losses=(loss, loss))
    shown = dashboard(tmp_path, "--wandb", "me/hoptim", "--dry-run")
    assert re.findall(r'"accessor": "(config:.*?)"', shown) == ["config:outer.value.lr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder of a run or a sweep, or --wandb"),
        (["nowhere"], "nowhere is no folder"),
        (["--wandb", "me"], "--wandb me: give the user or team and its project"),
        (["--report"], "give --wandb ENTITY/PROJECT as well"),
        ([str(ROOT / "conf")], "no run below"),
    ],
)
def test_a_wrong_call_says_what_to_do(arguments, message):
    process = run("tasks/dashboards/build.py", *arguments, check=False)
    assert process.returncode
    assert message in process.stderr


def test_without_an_account_it_says_how_to_have_one():
    pytest.importorskip("wandb_workspaces")
    process = run(workspace_job.__file__, "--wandb", "me/hoptim", check=False, NOBODY="1")
    assert re.search(r"wandb login.*--dry-run", process.stderr)


@pytest.mark.parametrize(("extra", "arguments"), [("dashboard", []), ("workspace", ["--wandb", "me/hoptim"])])
def test_a_package_that_is_missing_is_reported_with_the_remedy(finished, extra, arguments):
    process = run(workspace_job.__file__, finished, *arguments, check=False, NOTHING="1")
    assert f"in a checkout of hoptim, pip install '.[{extra}]'" in process.stderr


def test_the_script_writes_the_page_of_a_run(finished):
    page = finished / "again.html"
    assert run("tasks/dashboards/build.py", finished, "--output", page).stdout == f"wrote {page}\n"
    assert result(finished)["status"] == "finished"
    assert '<span class="chip ok">finished</span>' in page.read_text()
