"""The paper's experiments run at a tiny size, and the study of its results reads them."""

import json

import numpy as np
import pytest
from jobs import result, rows, run, train

QUIET = ("hoptim/tracker=[]", "plots=false")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Random images in the layout of CIFAR-10's arrays."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    arrays = {f"{part}_images": generator.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_labels": np.arange(60) % 10 for part in ("train", "test")}
    (folder / "cifar10").mkdir()
    np.savez(folder / "cifar10" / "cifar10.npz", **arrays)
    return folder


def results(root):
    return {path.parent.relative_to(root).as_posix(): result(path.parent) for path in root.rglob("result.json")}


def test_every_model_overfits_with_a_decay_for_each_of_its_weights(tmp_path):
    short = ("outer_steps=1", "inner_steps=1", "task.data=digits", "task.train=6", "task.val=6", "task.test=10")
    train("experiment=paper/overfit_mnist", f"root={tmp_path}", *short, *QUIET)
    weights = {name.split("model_of=")[1].split("/")[0]: found["weights"] for name, found in results(tmp_path).items()}
    assert weights == {"linear": 650, "wide": 64 * 65 + 650, "lenet": 61_706}
    assert all(found["hyperparameters"] == found["weights"] for found in results(tmp_path).values())
    assert all(found["moved"] == 1 for found in results(tmp_path).values())


def test_cifar10_has_the_same_experiment_with_two_more_models(tmp_path, images):
    model = ("task/model_of=resnet", "task.model_of.depth=8")  # not AlexNet, whose 23 million weights take long
    short = ("outer_steps=1", "inner_steps=1", f"task.root={images}", "task.train=6", "task.val=6", "task.test=10")
    train("experiment=paper/overfit_cifar10", f"root={tmp_path}", *model, *short, *QUIET)
    (found,) = results(tmp_path).values()
    assert found["hyperparameters"] == found["weights"]
    assert found["moved"] == 1


def test_distilled_images_train_a_new_model_beside_the_plain_trainings(tmp_path):
    short = ("outer_steps=2", "inner_steps=10", "every=5", "warmup=5", "task.data=digits", "val_batch_size=50")
    sizes = ("task.train=20", "task.val=100", "baselines.all_real_images.task={train:60,val:10,decay:0}")
    train("experiment=paper/distill", f"root={tmp_path}", *short, *sizes, "hoptim/tracker=[]")
    found = {name.split("/")[-1]: value for name, value in results(tmp_path).items()}
    assert found["seed=0"]["hyperparameters"] == 10 * 64
    assert found["seed=0"]["moved"] == 4
    assert 0 <= found["seed=0"]["retrained_test_accuracy"] <= 1
    assert found["one_real_image_a_class"]["train_accuracy"] == 1.0
    assert {value["hyperparameters"] for name, value in found.items() if "real" in name} == {1}


def test_the_four_rows_of_the_augmentation_network(tmp_path, images):
    short = ("epochs=2", "batch_size=10", "inner_steps=4", "every=4", "warmup=0", "scheduler.T_max=8", "val_batch_size=10")
    sizes = ("task.device=cpu", "task/model_of=cnn", f"task.root={images}", "task.train=40", "task.val=20", "seed=0")
    train("experiment=paper/augment", f"root={tmp_path}", *short, *sizes, *QUIET)
    found = {name.split("learned_by=")[1].split("/")[0]: value for name, value in results(tmp_path).items()}
    moved = {name: value["moved"] for name, value in found.items()}
    assert moved == {"none": 0, "identity": 2, "neumann": 2, "unrolled": 2}
    assert found["none"]["hyperparameters"] == 1  # the fixed decay, at the size of the others'
    products = {name: value["products"] for name, value in found.items()}
    assert (products["none"], products["identity"]) == (0, 0)
    assert products["neumann"] >= 2 * 3  # and what the step size takes
    text = run("studies/paper/run.py", tmp_path).stdout
    (line,) = [line for line in text.splitlines() if line.startswith("| neumann")]
    assert line.split(" | ")[1:4] == ["94.6 %", f"{found['neumann']['test_accuracy']:.1%}", "2"]


def written(folder, accuracy, inner, hyper):
    """A finished run with two rows."""
    folder.mkdir(parents=True)
    final = {"status": "finished", "name": "x", "seed": folder.name.partition("=")[2], "hypersteps": 2}
    (folder / "result.json").write_text(json.dumps({**final, "test_accuracy": accuracy}))
    row = {"inner_seconds": inner / 2, "hyper_seconds": hyper / 2}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    assert len(rows(folder)) == 2


def test_a_row_has_mean_and_standard_error_and_its_cost_in_plain_trainings(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        written(tmp_path / "paper_augment" / "learned_by=neumann" / f"seed={seed}", accuracy, inner=4.0, hyper=2.0)
        written(tmp_path / "paper_augment" / "learned_by=none" / f"seed={seed}", 0.4, inner=3.0, hyper=0.0)
    (tmp_path / "paper_augment" / "learned_by=neumann" / "seed=9").mkdir()
    failed = {"status": "failed", "name": "x", "seed": 9, "error": "no"}
    (tmp_path / "paper_augment" / "learned_by=neumann" / "seed=9" / "result.json").write_text(json.dumps(failed))
    told = run("studies/paper/run.py", tmp_path).stdout.splitlines()
    assert "| neumann | 94.6 % | 60.0% ± 5.8% | 2 | 2.00 | 6 |" in told
    assert "| identity | 94.1 % |  |  |  |  |" in told
