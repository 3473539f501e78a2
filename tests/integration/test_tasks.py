"""The models, the data and the losses of scripts/tasks, by values."""

from functools import partial

import numpy as np
import pytest
import torch
from tasks import data, models
from tasks.classification import Classification
from torch import nn
from torch.nn import functional as F

from hoptim.recipes import AugmentationNet, DistilledData, WeightDecay

MNIST, CIFAR10 = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("make", "shape", "weights"),
    [
        (models.linear, MNIST, 7_850),  # these five are the paper's numbers
        (models.linear, CIFAR10, 30_730),
        (models.mlp, MNIST, 623_290),
        (models.mlp, CIFAR10, 9_470_986),
        (models.alexnet, CIFAR10, 23_272_266),
        (models.lenet, MNIST, 61_706),
        (models.lenet, CIFAR10, 62_006),
        (partial(models.resnet, depth=20), CIFAR10, 269_722),  # 0.27 M in He et al. 2016, table 6
        (models.resnet, CIFAR10, 658_586),  # 0.66 M there and in the paper
        (models.resnet18, CIFAR10, 11_173_962),
    ],
)
def test_the_models_have_as_many_weights_as_published(make, shape, weights):
    with torch.device("meta"):
        model = make(shape, 10)
        z = model(torch.empty(2, *shape))
    assert sum(p.numel() for p in model.parameters()) == weights
    assert z.shape == (2, 10)


@pytest.mark.parametrize(("before", "after", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_a_block_is_two_convolutions_and_a_shortcut_without_weights(before, after, stride):
    block, x = models.Block(before, after, stride), torch.randn(5, before, 6, 6)
    found = block(x)
    first, one, _, second, two = block.residual

    def normed(z, norm):
        mean, variance = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), keepdim=True, unbiased=False)
        return (z - mean) / (variance + norm.eps).sqrt()

    z = normed(F.conv2d(x, first.weight, stride=stride, padding=1), one).clamp(min=0)
    shortcut = torch.zeros_like(found)
    shortcut[:, :before] = x[:, :, ::stride, ::stride]
    torch.testing.assert_close(found, (normed(F.conv2d(z, second.weight, padding=1), two) + shortcut).clamp(min=0))


def test_a_resnet_is_its_stem_its_blocks_and_the_mean_over_places():
    model, x = models.resnet(CIFAR10, 7, depth=14, width=4).eval(), torch.randn(2, *CIFAR10)
    blocks = [part for part in model if isinstance(part, models.Block)]
    assert [(block.residual[0].in_channels, block.residual[0].out_channels, block.stride) for block in blocks] == [
        (4, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 16, 2), (16, 16, 1),
    ]  # fmt: skip
    z = model[:3](x)
    for block in blocks:
        z = block(z)
    assert z.shape == (2, 16, 8, 8)
    torch.testing.assert_close(model(x), z.mean((2, 3)) @ model[-1].weight.T + model[-1].bias)


def test_a_depth_that_is_no_resnet_is_named():
    with pytest.raises(ValueError, match="depth=45: give 6n"):
        models.resnet(CIFAR10, 10, depth=45)


def cifar10_in(folder, train=40, test=20):
    """Random images in the layout of CIFAR-10's arrays."""
    generator, arrays = np.random.default_rng(0), {}
    for part, count in {"train": train, "test": test}.items():
        arrays[f"{part}_images"] = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % 10
    (folder / "cifar10").mkdir()
    np.savez(folder / "cifar10" / "cifar10.npz", **arrays)
    return arrays


def test_images_are_read_channels_first_from_zero_to_one_and_keep_their_test_set(tmp_path):
    arrays = cifar10_in(tmp_path)
    found = data.read("cifar10", tmp_path)
    assert (found.x.shape, found.training) == ((60, *CIFAR10), 40)
    value = found.x[41, 2, 5, 7].item() / found.scale
    assert value == pytest.approx(arrays["test_images"][1, 5, 7, 2] / 255)
    assert found.y[:40].tolist() == arrays["train_labels"].tolist()


@pytest.mark.parametrize("balanced", [False, True])
def test_a_split_has_no_overlap_and_tests_on_examples_that_may_not_train(balanced):
    given = data.Labelled(torch.zeros(100, 1), torch.arange(100) % 10, training=70)
    parts = data.split(given, 30, 20, 25, seed=3, balanced=balanced)
    assert [len(part) for part in parts.values()] == [30, 20, 25]
    assert len(torch.cat(list(parts.values())).unique()) == 75
    assert max(parts["train"].max(), parts["val"].max()) < 70 <= parts["test"].min()
    again, other = (data.split(given, 30, 20, 25, seed, balanced=balanced) for seed in (3, 4))
    assert torch.equal(again["train"], parts["train"])
    assert not torch.equal(other["train"], parts["train"])
    assert (given.y[parts["train"]].bincount().tolist() == [3] * 10) == balanced


def test_a_set_without_a_test_set_is_split_in_three():
    given = data.Labelled(torch.zeros(50, 1), torch.arange(50) % 2, training=50)
    parts = data.split(given, 20, 10, None, seed=0)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(50))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"train": 60, "val": 20}, "val=20: the data have 10 examples left"),
        ({"train": 5, "val": 5, "balanced": True}, "train=5, balanced: give a multiple of the 2"),
        ({"train": 70, "val": 1, "balanced": True}, "a class has fewer than 35"),
    ],
)
def test_a_split_that_the_data_do_not_allow_is_named(wanted, words):
    given = data.Labelled(torch.zeros(80, 1), (torch.arange(80) < 30).long(), training=70)
    with pytest.raises(ValueError, match=words):
        data.split(given, **{"test": None, "seed": 0, **wanted})


def test_the_training_part_has_mean_zero_and_deviation_one():
    x, part = 3 + 2 * torch.randn(30, 3, 4, 4), torch.arange(10)
    x[:, 1] = 5.0  # a channel that never changes stays finite
    found = data.standardised(x, part)
    torch.testing.assert_close(found[part].mean((0, 2, 3)), torch.zeros(3))
    torch.testing.assert_close(found[part].std((0, 2, 3)), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(found[20, 0], (x[20, 0] - x[part, 0].mean()) / x[part, 0].std())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_just_the_share_of_the_given_labels_is_wrong_and_evenly_so(share):
    y, examples = torch.arange(9_000) % 3, torch.arange(0, 9_000, 2)
    found = data.with_wrong_labels(y, examples, share, 3, seed=1)
    changed = found != y
    assert changed.sum() == round(share * len(examples))
    assert not changed[1::2].any()
    if share:
        shifts = ((found - y) % 3)[changed].bincount(minlength=3).double() / changed.sum()
        torch.testing.assert_close(shifts, torch.tensor([0.0, 0.5, 0.5]), atol=0.05, rtol=0)


def task_of(**options):
    task = Classification(**{"data": "digits", "model_of": models.linear, "train": 30, "val": 20, **options})
    parts = task.setup(0)
    task.x = task.x.double()
    return task, parts, task.problem()


def test_the_training_loss_is_cross_entropy_with_a_decay_for_each_weight_biases_included():
    decay = partial(WeightDecay, per="weight", start=0.2, include=models.every_weight)
    task, parts, problem = task_of(recipes={"weight_decay": decay}, decay=0.3)
    weights = list(problem.model.parameters())
    expected = F.cross_entropy(problem.model(task.x[parts["train"]]), task.y[parts["train"]])
    expected = expected + 0.5 / 2 * sum(w.square().sum() for w in weights)
    torch.testing.assert_close(task.train_loss(problem.model, problem.hparams, parts["train"]), expected)
    assert sum(leaf.numel() for leaf in problem.hparams.parameters()) == sum(w.numel() for w in weights)


def test_distilled_images_alone_train_and_real_ones_validate():
    task, parts, problem = task_of(recipes={"distilled_data": DistilledData, "weight_decay": None})
    images, labels = problem.hparams["distilled_data"].examples()
    for batch in (parts["train"], parts["val"]):
        found = task.train_loss(problem.model, problem.hparams, batch)
        torch.testing.assert_close(found, F.cross_entropy(problem.model(images), labels))
    real = F.cross_entropy(problem.model(task.x[parts["val"]]), task.y[parts["val"]])
    torch.testing.assert_close(task.val_loss(problem.model, problem.hparams, parts["val"]), real)


def test_the_augmentation_network_changes_what_trains_and_not_what_validates():
    task, parts, problem = task_of(recipes={"augmentation_net": AugmentationNet})
    with torch.no_grad():
        problem.hparams["augmentation_net"].layers[-1].bias.fill_(0.5)  # x + 0.5
    x, y = task.x[parts["val"]], task.y[parts["val"]]
    torch.testing.assert_close(task.predict(problem.model, problem.hparams, parts["val"]), problem.model(x + 0.5))
    found = task.val_loss(problem.model, problem.hparams, parts["val"])
    torch.testing.assert_close(found, F.cross_entropy(problem.model(x), y))


def test_data_model_and_recipes_are_on_the_device():
    options = {"data": "digits", "model_of": models.linear, "train": 30, "val": 20, "device": "meta"}
    task = Classification(**options, recipes={"distilled_data": DistilledData})
    task.setup(0)
    model = task.model()
    tensors = [task.x, task.y, task.source, *model.parameters(), *task.hparams(model).parameters()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_task_whose_recipes_are_all_left_out_says_so():
    with pytest.raises(ValueError, match="there is no recipe"):
        Classification(data="digits", model_of=nn.Identity, train=1, val=1, recipes={"gate": None})
