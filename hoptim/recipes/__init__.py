"""Recipes: hyperparameters that are ready for use, each with its part of the training loss.

A recipe is a :class:`HyperParameters` or another module, with a method for the training loss. Use it as ``hparams``, alone
or in an ``nn.ModuleDict`` beside others:

>>> import torch
>>> from torch import nn
>>> from hoptim import HyperParameters
>>> hparams = nn.ModuleDict({"decay": WeightDecay(nn.Linear(2, 3)), "rest": HyperParameters({"shift": torch.zeros(3)})})
>>> [name for name, _ in hparams.named_parameters()]
['decay.decay.weight', 'rest.shift']

# What to tune

| to learn | recipe and its part of the training loss | numbers | constraint |
|---|---|---|---|
| weight decays | `WeightDecay(model, per=...)`, `.penalty(model)` | 1 to one a weight | positive |
| scales of Gaussian priors | `PriorScale(model, examples, per=...)`, `.penalty(model)` | 1 to one a weight | positive |
| noise before layers | `NoiseWidth(model, layers)`, `.call(model, x)` | one a layer | unit interval |
| dropout before layers | `Dropout(model, layers, per=...)`, `.call(model, x)` | one a layer or unit | unit interval |
| label smoothing | `LabelSmoothing()`, `.cross_entropy(z, y)` | 1 | unit interval |
| a temperature of logits | `Temperature()`, `.cross_entropy(z, y)` | 1 | positive |
| a weight for each example | `ExampleWeights(n)`, `.mean(losses, index)` | n | unit interval |
| a label for each example | `SoftLabels(labels)`, `.cross_entropy(z, index)` | n·(K − 1) | simplex |
| weights of several losses | `LossWeights(names)`, `.sum(losses)` | K − 1 | simplex |
| a mixture of data sources | `DomainWeights(sizes)`, `.mean(losses, source)` | K − 1 | simplex |
| changes of images | `Augmentation(changes)`, `.augment(x)` | one a change | positive |
| a network that changes images | `AugmentationNet(channels)`, `hparams(x)` | thousands | real |
| training examples themselves | `DistilledData(classes, shape)`, `.examples()` | one a pixel | real |
| a schedule over the steps | `Schedule(steps, knots)`, `.at(t)`, with `hoptim.Replay` | one a knot | positive |
| one of several options | `Categorical(options)`, `.mix(found)`, `.harden()` | K − 1 | simplex |
| which features or units to keep | `Gate(n)`, `.values()`, `.harden()` | n | unit interval |

*How many.* A few hyperparameters can be learned from a small validation set; `hoptim.CrossValidated` does so without giving
up training data. As many as there are examples or weights can overfit a validation set, as weights overfit a training set:
keep it large, and judge by a test set that took no part.

# Settings for each

The rate is that of an outer Adam, the warm-up a share of all steps. Where nothing else is said, learn on one part of the
data and validate on another, then train on both with `hoptim.retrain`. Each family has an experiment in
conf/experiment/recipes, such as `python scripts/train.py experiment=recipes/dropout`; scripts/README.md, "Recipes at work",
has the results.

| recipe | outer rate | warm-up | validation |
|---|---|---|---|
| `WeightDecay`, `PriorScale` | 0.6 | a quarter | folds where there are few; a large set for one a weight |
| `NoiseWidth`, `Dropout`, `LabelSmoothing` | 0.3 | a quarter | folds |
| `Temperature` in the training loss | 0.05 | a quarter | folds |
| `Temperature` in the validation loss alone | 0.05 | a quarter or more | a part; nothing to retrain |
| `ExampleWeights` | 0.3 | a quarter | examples with right labels, so no folds |
| `SoftLabels` | 0.1 | a quarter | examples with right labels, so no folds |
| `LossWeights` | 0.1 | a quarter | the loss that counts; folds or a part |
| `DomainWeights` | 0.1 | a quarter | examples of what is wanted, so no folds |
| `Augmentation` | 0.05 | a quarter | folds or a part; images as they are |
| `AugmentationNet` | 0.01 | a quarter | a large part |
| `DistilledData` | 0.03 | none | all real training examples; nothing to retrain |
| `Schedule` | 0.3 | none, by `hoptim.Replay` | a part; scripts/examples/learned_schedule.py |
| a rate, a momentum, by `options` | 0.05 | none, by `hoptim.Unrolled` | a part |
| `Categorical` | 0.1 | a quarter | a part; then `harden()` and train the chosen one |
| `Gate` | 0.3 | a fifth | folds or a part, with a small price for each in its loss |

*The outer optimizer* is `hparams.optimizer()`, Adam with a rate for each constraint: 0.05 for `positive`, where a step is
about 5 %, 0.3 for `unit_interval`, 0.1 for `real` and `simplex`. For a `real` hyperparameter the rate should be small
compared to its size; for a learned momentum it should be below 0.3, which took one to 0.999. `AugmentationNet`,
`DistilledData` and `Schedule` have the rates of this table instead. For recipes in an `nn.ModuleDict` it is
`hoptim.outer_adam(hparams)`, with the rates and levels of each, which `hoptim.CrossValidated` takes by itself.

*Levels.* Decays move together as well as each by itself. What is wrong at first is their common size, and the sum of their
hypergradients says which way, where each alone is noise. So all decays of a recipe share a level, which Adam moves at 0.6,
those of a tensor another one at 0.2, and each moves at 0.1 by what sets it apart from the others of its tensor. All three
rates fall, by 1/√(1 + t/2) after t hypersteps, since weights follow late, and a level that goes on at full speed swings. A
decay is drawn to the mean of its tensor, the more, the fewer validation examples there are: give their number, as in
`hparams.optimizer(validation=100)`; the default is 200. Rates of `Dropout` a unit share levels too, at 0.3 like each of
them, and so do the weights of examples of one class or source, `ExampleWeights(n, groups=source)`. With one rate a unit of
an MLP on 1,000 garments the test loss was 0.62 to 0.67 on three seeds, without levels 0.72 to 0.75; with weights and four
sources of labels it was even (−4 to 1 %). For levels of your own see `hoptim.HyperParameters`.

*Warm-up.* A quarter of the steps for what acts on a trained model, as decays and noise do; on twelve tasks none at all did
about as well. A schedule learned by `Replay` needs none, since it differentiates through the whole training.

*Inner rate.* `ExampleWeights` and `DomainWeights` start at the plain mean, so the rate of a plain training suits both at
first. Later an example of `ExampleWeights` counts up to 1/`start` times, 2 by default, so that steps get longer: take a
smaller rate if the training then oscillates or fits wrong labels.

*Colours.* `Augmentation` changes no hue or saturation. kornia's `adjust_hue` and `adjust_saturation` are differentiable and
go into a training loss as they are, but for images from 0 to 1: on standardised ones a factor of 1 changes saturation too.

*Evaluation.* The validation loss has no noise, smoothing, decay or weights in it: it calls the plain model in `eval()`.
`Gate` and `Categorical` belong to the model, so the validation loss has them with `training=False`.
"""

from hoptim.recipes.choices import Categorical, Gate
from hoptim.recipes.data import Augmentation, AugmentationNet, DistilledData
from hoptim.recipes.decay import PriorScale, WeightDecay
from hoptim.recipes.labels import LabelSmoothing, SoftLabels, Temperature
from hoptim.recipes.noise import Dropout, NoiseWidth
from hoptim.recipes.schedule import Schedule
from hoptim.recipes.weights import DomainWeights, ExampleWeights, LossWeights

__all__ = [
    "Augmentation",
    "AugmentationNet",
    "Categorical",
    "DistilledData",
    "DomainWeights",
    "Dropout",
    "ExampleWeights",
    "Gate",
    "LabelSmoothing",
    "LossWeights",
    "NoiseWidth",
    "PriorScale",
    "Schedule",
    "SoftLabels",
    "Temperature",
    "WeightDecay",
]
