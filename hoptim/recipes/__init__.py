"""Recipes: hyperparameters that are ready for use, each with its part of the loss. See hoptim/recipes/README.md."""

from hoptim.recipes.augmentation import Augmentation, AugmentationNet
from hoptim.recipes.categorical import Categorical
from hoptim.recipes.distilled_data import DistilledData
from hoptim.recipes.domain_weights import DomainWeights
from hoptim.recipes.dropout import Dropout
from hoptim.recipes.example_weights import ExampleWeights
from hoptim.recipes.gate import Gate
from hoptim.recipes.label_smoothing import LabelSmoothing
from hoptim.recipes.loss_weights import LossWeights
from hoptim.recipes.noise_width import NoiseWidth
from hoptim.recipes.prior_scale import PriorScale
from hoptim.recipes.schedule import Schedule
from hoptim.recipes.soft_labels import SoftLabels
from hoptim.recipes.temperature import Temperature
from hoptim.recipes.weight_decay import WeightDecay

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
