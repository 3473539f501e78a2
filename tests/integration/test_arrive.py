"""scripts/arrive.py: a fixed decay is a loop written by hand, one that learns moves, and the figures are of the rows."""

import json
import math
from dataclasses import replace
from pathlib import Path

import arrive
import pytest
import torch
from arrive import ALONE, LEVELS, SETS, Job
from learning_tasks import data
from torch.nn import functional as F

NOWHERE = Path("nowhere")


@pytest.fixture
def made_up(float64, monkeypatch):
    """Data in place of what has to be downloaded, short trainings, and everything in float32, as the study runs."""
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(5500) % 10
    images = torch.rand(5500, 1, 14, 14, generator=generator) * (1 + y[:, None, None, None]) / 10
    features = torch.randn(506, 13, generator=generator)
    monkeypatch.setattr(data, "fashion", lambda root: (images, y))
    monkeypatch.setattr(data, "boston", lambda root: (features, features[:, :1] + 1))
    monkeypatch.setattr(data, "novel", lambda root: torch.randint(27, (40_000,), generator=generator))
    monkeypatch.setattr(arrive, "SETS", {name: replace(one, steps=8, every=2) for name, one in SETS.items()})


@pytest.mark.parametrize("how", ["fixed", "joined"])
def test_a_fixed_decay_is_a_plain_training_with_it(how, made_up):
    found = arrive.run(Job(set="table", seed=5, how=how, start=0.3), NOWHERE)
    x, y, (train, val, test) = arrive.housing(NOWHERE, torch.Generator().manual_seed(1005))
    torch.manual_seed(5)
    model = SETS["table"].make()
    sgd = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    examples = train if how == "fixed" else torch.cat([train, val])
    batches = examples[torch.randperm(len(examples))].split(50)[::-1]
    for step in range(8):
        if step == len(batches):
            batches = (*batches, *examples[torch.randperm(len(examples))].split(50)[::-1])
        sgd.param_groups[0]["lr"] = 0.03 * (1 - step / 8)
        decayed = sum(w.square().sum() for w in model.parameters() if w.ndim > 1)
        sgd.zero_grad()
        (F.mse_loss(model(x[batches[step]]), y[batches[step]]) + 0.15 * decayed).backward()
        sgd.step()
    with torch.no_grad():
        assert found["test"] == pytest.approx(F.mse_loss(model(x[test]), y[test]).item(), rel=1e-5)
    assert found["decay"] == pytest.approx(0.3)


@pytest.mark.parametrize("name", SETS)
def test_decays_that_learn_move_by_their_rate(name, made_up):
    found = arrive.run(Job(set=name, seed=0, how=ALONE, start=1e-3), NOWHERE)
    assert math.isfinite(found["test"])
    last = abs(math.log(found["decay"] / 1e-3))
    assert 0.01 < last <= 4 * 0.05 * 1.01  # hypersteps after steps 2, 4, 6, 8, each at most at the rate


def test_levels_move_once_where_adam_alone_moves_four_times(made_up):
    found = arrive.run(Job(set="table", seed=0, how=LEVELS, start=1e-3), NOWHERE)
    assert abs(math.log(found["decay"] / 1e-3)) == pytest.approx(0.6, rel=1e-3)


def test_rows_are_not_run_again_and_the_figures_are_theirs(made_up, tmp_path, monkeypatch, capsys):
    all_jobs = [job for seed in (300, 301) for job in arrive.jobs("mlp", seed)]
    assert len(set(all_jobs)) == 2 * (2 * 4 + 2 * 3 * 2)
    rows = [
        {
            **job.__dict__,
            "test": 2.0 + job.start + (job.seed - 300),
            "val": 1.0,
            "decay": job.start,
            "said": "",
            "seconds": 1.0,
        }
        for job in all_jobs
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(arrive, "run", lambda *_: pytest.fail("it is run again"))
    assert arrive.studied(["mlp"], [300, 301], path, NOWHERE) == rows
    assert arrive.losses(rows, how="fixed") == {300: 2.001, 301: 3.001}  # of the lowest of the four fixed values
    changes = arrive.against_best(rows, "mlp", how=LEVELS, start=3e-3 * 30)
    assert changes == pytest.approx([100 * (2.09 / 2.001 - 1), 100 * (3.09 / 3.001 - 1)])
    thirds = [{**row, "set": "lstm", "start": row["start"] / 3} for row in rows if row["how"] == LEVELS]
    assert arrive.losses(arrive.five_digits(thirds), start=1e-4 / 3).keys() == {300, 301}, "saved as 3.3333e-5"
    arrive.report(rows, arrive.wide_console(250))
    shown = capsys.readouterr().out
    assert "+3.7 ± 0.7" in shown
    assert "said nothing: 0" in shown
    rows[-1]["test"] = 5.0  # from too high, to far above the best
    arrive.report(rows, arrive.wide_console(250))
    assert "said nothing: 1" in capsys.readouterr().out
    arrive.draw(rows, tmp_path / "arrive.png")
    assert (tmp_path / "arrive.png").stat().st_size > 10_000
