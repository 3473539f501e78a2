"""Recipes: hyperparameters that are ready for use, each with its part of the loss. See hoptim/recipes/README.md."""

from hoptim.recipes.choices import Categorical, Gate
from hoptim.recipes.data import Augmentation, AugmentationNet, DistilledData
from hoptim.recipes.decay import PriorScale, WeightDecay
from hoptim.recipes.initialization import Initialization
from hoptim.recipes.labels import LabelSmoothing, SoftLabels, Temperature
from hoptim.recipes.noise import Dropout, NoiseWidth
from hoptim.recipes.rater import Rater
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
    "Initialization",
    "LabelSmoothing",
    "LossWeights",
    "NoiseWidth",
    "PriorScale",
    "Rater",
    "Schedule",
    "SoftLabels",
    "Temperature",
    "WeightDecay",
]
