"""Shared by the frameworks' examples: digits with 40 % wrong training labels, and a learned weight for each of them."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import constraints
from torch.nn import functional as F

import hoptim


def digits():
    """600 training digits (x, y, index), 200 for validation, and the rest for testing (x, y)."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    draw = torch.Generator().manual_seed(0)
    order, wrong = torch.randperm(len(x), generator=draw), torch.rand(600, generator=draw) < 0.4
    x, y = x[order].float() / 16, y[order]
    y[:600][wrong] = torch.randint(10, (int(wrong.sum()),), generator=draw)
    return (x[:600], y[:600], torch.arange(600)), (x[600:800], y[600:800]), (x[800:], y[800:])


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def example_weights():
    return hoptim.HyperParameters({"example_weight": torch.full((600,), 0.5)}, {"example_weight": constraints.unit_interval})


def train_loss(net, learned, batch):
    x, y, number = batch
    return (learned["example_weight"][number] * F.cross_entropy(net(x), y, reduction="none")).mean()


def val_loss(net, learned, batch):
    return F.cross_entropy(net(batch[0]), batch[1])
