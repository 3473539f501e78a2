"""Recipes: hyperparameters that come ready for use, with the losses' terms that they are for.

A recipe is a :class:`HyperParameters` that knows the model. It goes where ``hparams`` goes, alone or in an
``nn.ModuleDict`` beside others:

>>> import torch
>>> from torch import nn
>>> from hoptim import HyperParameters
>>> hparams = nn.ModuleDict({"decay": WeightDecay(nn.Linear(2, 3)), "rest": HyperParameters({"shift": torch.zeros(3)})})
>>> [name for name, _ in hparams.named_parameters()]
['decay.decay.weight', 'rest.shift']
"""

from hoptim.recipes.example_weights import ExampleWeights
from hoptim.recipes.label_smoothing import LabelSmoothing
from hoptim.recipes.noise_width import NoiseWidth
from hoptim.recipes.weight_decay import WeightDecay

__all__ = ["ExampleWeights", "LabelSmoothing", "NoiseWidth", "WeightDecay"]
