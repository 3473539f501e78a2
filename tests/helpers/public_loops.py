"""Three public scripts, rewritten for small data: torchvision's reference, pytorch/examples imagenet, Accelerate's example.

Each trains once and returns the model that its script would evaluate, and its optimizer. `arm` is "hoptim", or anything else
for the script alone, with its own weight decay.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import get_linear_schedule_with_warmup

import hoptim

DECAY = 1e-4  # the weight decay of both image scripts, and the start of the learned decays


def drop_in(inner, model, fit, val_loss, val_batches, steps, **options):
    """The script's optimizer with hoptim around it, every ten steps after a quarter of them."""
    hparams = hoptim.recipes.WeightDecay(model, start=DECAY)
    problem = hoptim.Problem(model, hparams, fit, val_loss, **options)
    return hoptim.BilevelOptimizer(inner, hparams.optimizer(), problem, val_batches=val_batches, every=10, warmup=steps // 4)


# Pictures ---------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions with norms, and a third one on the shortcut around them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        first, second = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.body = nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), second, nn.BatchNorm2d(outputs))
        self.past = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return F.relu(self.body(x) + self.past(x))


def residual():
    """A small residual network for grey images of 28×28 pixels."""
    stem = (nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*stem, Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def mixup(x, y, alpha=0.2):
    share, targets = torch.distributions.Beta(alpha, alpha).sample(), F.one_hot(y, 10).float()
    return x.lerp(x.roll(1, 0), share), targets.lerp(targets.roll(1, 0), share)


def plain_cross_entropy(model, hparams, batch):
    return F.cross_entropy(model.eval()(batch[0]), batch[1])


def decayed(criterion):
    """The training loss: the criterion of the logits, plus the penalty with the learned decays."""

    def predict(model, hparams, batch):
        return model(batch[0])

    def of_logits(z, hparams, batch):
        return criterion(z, batch[1])

    def penalty(model, hparams):
        return hparams.penalty(model)

    return hoptim.CompositeLoss(predict, of_logits, penalty)


@dataclass(frozen=True)
class Torchvision:
    """references/classification: mixup, label smoothing, clipping, averaged weights, a cosine schedule after a warm-up."""

    epochs: int = 16
    rise: int = 2  # epochs of the warm-up
    batch_size: int = 32
    lr: float = 0.05
    decay: float = DECAY  # without hoptim

    def train(self, arm, train, val):
        model, criterion = residual(), nn.CrossEntropyLoss(label_smoothing=0.1)
        optimizer = torch.optim.SGD(
            model.parameters(), self.lr, momentum=0.9, weight_decay=0.0 if arm == "hoptim" else self.decay, nesterov=True
        )
        loader = DataLoader(TensorDataset(*train), self.batch_size, shuffle=True)
        if arm == "hoptim":
            fit = decayed(criterion)
            steps = self.epochs * len(loader)
            optimizer = drop_in(optimizer, model, fit, plain_cross_entropy, [val], steps, has_aux=True)
        parts = [LinearLR(optimizer, 0.01, total_iters=self.rise), CosineAnnealingLR(optimizer, self.epochs - self.rise)]
        schedule = SequentialLR(optimizer, parts, [self.rise])
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
        seen = []  # accuracies, which the script logs
        for epoch in range(self.epochs):
            model.train()
            for i, (x, y) in enumerate(loader):
                image, target = mixup(x, y)
                if arm == "hoptim":
                    loss, output = optimizer.loss((image, target))
                else:
                    output = model(image)
                    loss = criterion(output, target)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if i % 4 == 0:
                    average.update_parameters(model)
                    if epoch < self.rise:
                        average.n_averaged.zero_()  # during the warm-up the average is a copy of the weights
                seen.append((output.argmax(1) == target.argmax(1)).float().mean())
            schedule.step()
        return average, optimizer


@dataclass(frozen=True)
class ImageNet:
    """pytorch/examples imagenet on all ranks: DistributedDataParallel, distributed samplers, a step schedule."""

    epochs: int = 12
    batch_size: int = 64  # summed over the ranks
    lr: float = 0.1
    decay: float = DECAY

    def train(self, arm, train, val):
        ranks, rank = distributed.get_world_size(), distributed.get_rank()
        model, criterion = DistributedDataParallel(residual()), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(
            model.parameters(), self.lr, momentum=0.9, weight_decay=0.0 if arm == "hoptim" else self.decay
        )
        schedule = StepLR(optimizer, self.epochs // 3, 0.1)
        sampler = DistributedSampler(range(len(train[0])))
        loader = DataLoader(TensorDataset(*train), self.batch_size // ranks, sampler=sampler)
        if arm == "hoptim":
            fit = decayed(criterion)
            own = tuple(part[rank::ranks] for part in val)
            optimizer = drop_in(optimizer, model, fit, plain_cross_entropy, [own], self.epochs * len(loader), has_aux=True)
        for epoch in range(self.epochs):
            sampler.set_epoch(epoch)
            model.train()
            for image, target in loader:
                if arm == "hoptim":
                    loss, _ = optimizer.loss((image, target))
                else:
                    loss = criterion(model(image), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        return model.module, optimizer


# Text -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accelerated:
    """Accelerate's nlp_example: everything goes through prepare(), gradients are accumulated by hand, a linear schedule."""

    network: Callable[[], nn.Module]
    epochs: int = 3
    batch_size: int = 8
    accumulated: int = 2  # batches in a step
    lr: float = 3e-4
    decay: float = 0.01

    def train(self, arm, train, val):
        accelerator, model = Accelerator(cpu=True), self.network()
        optimizer = torch.optim.AdamW(model.parameters(), self.lr, weight_decay=0.0 if arm == "hoptim" else self.decay)
        loader = DataLoader(TensorDataset(*train), self.batch_size, shuffle=True, drop_last=True)
        steps = self.epochs * len(loader) // self.accumulated
        problem = None
        if arm == "hoptim":

            def val_loss(model, hparams, batch):
                return model.eval()(batch[0], labels=batch[1]).loss

            def train_loss(model, hparams, batch):
                return model(batch[0], labels=batch[1]).loss + hparams.penalty(model)

            optimizer = drop_in(optimizer, model, train_loss, val_loss, [val], steps)
            problem = optimizer.problem
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        if problem is not None:
            problem.wrapper = model
        for _ in range(self.epochs):
            model.train()
            for step, batch in enumerate(loader):
                loss = optimizer.optimizer.loss(batch) if arm == "hoptim" else model(batch[0], labels=batch[1]).loss
                accelerator.backward(loss / self.accumulated)
                if step % self.accumulated == self.accumulated - 1:
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        return model, optimizer.optimizer


def on_ranks(work, *arguments):
    """Call ``work(*arguments)`` in two processes on the CPU; all has been imported here, so they are forked."""
    with tempfile.TemporaryDirectory() as folder:
        given = (f"{folder}/meeting", work, arguments)
        torch.multiprocessing.start_processes(_ranked, given, nprocs=2, start_method="fork")


def _ranked(rank, meeting, work, arguments):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    work(*arguments)
    distributed.destroy_process_group()
