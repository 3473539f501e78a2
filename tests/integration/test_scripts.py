"""Three kinds of training scripts: a language model that carries a hidden state, an image classifier with all extras, a GPT.

Each loop runs ``plain``, with a fixed decay and a bare optimizer, and with hoptim dropped in. With ``every=None`` both end
in the same bits. With hypersteps, the training loss that each of them saw is computed again on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hoptim
from hoptim.recipes import WeightDecay

START = 1e-3
Setup = Callable[[nn.Module, torch.optim.Optimizer], Any]


@pytest.fixture(autouse=True)
def float32(float64: None) -> None:
    torch.set_default_dtype(torch.float32)


class Watched(hoptim.BilevelOptimizer):
    """Keeps, for each hyperstep, the model and decays that it stood before, its batch and its record."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[tuple[Any, ...]] = []

    def hyperstep(self, *args: Any) -> hoptim.Record:
        model, decay = copy.deepcopy((self.problem.model, self.problem.hparams))
        masks, batch = torch.get_rng_state(), self.last
        record = super().hyperstep(*args)
        self.seen.append((model, decay, batch, masks, record))
        return record

    def loss(self, batch: Any) -> Any:
        self.last = batch
        return super().loss(batch)


def check_hypersteps(optimizer: Watched, loss_of: Callable[[Any, Any], Tensor], count: int) -> None:
    """Each saw the training loss at the new weights with the masks of the next step, and moved what it started from."""
    assert len(optimizer.seen) == count
    for model, decay, batch, masks, record in optimizer.seen:
        assert record.moved
        with torch.random.fork_rng(), torch.no_grad():
            torch.set_rng_state(masks)
            expected = loss_of(model, batch) + decay.penalty(model)
        torch.testing.assert_close(record.result.train_loss, expected, rtol=1e-5, atol=0)
        for name, value in record.hyperparameters.items():
            assert (value / decay[name]).log().abs().max() > 1e-3, name


# A language model: truncated backpropagation through time, dropout, tied weights, clipping ------------------------------


class Reader(nn.Module):
    def __init__(self, letters: int = 8, width: int = 12) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(letters, width), nn.Dropout(0.2)
        self.rnn, self.out = nn.LSTM(width, width, 2, dropout=0.2), nn.Linear(width, letters)
        self.out.weight = self.embedding.weight

    def forward(self, letters: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        found, hidden = self.rnn(self.drop(self.embedding(letters)), hidden)
        return self.out(self.drop(found)).flatten(0, 1), hidden


def text() -> Tensor:
    """Four streams of 121 letters: mostly the next one of the alphabet."""
    steps = torch.randint(1, 8, (121, 4)).where(torch.rand(121, 4) < 0.2, torch.tensor(1))
    return steps.cumsum(0) % 8


def chunks(stream: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(stream[i : i + 10], stream[i + 1 : i + 11].flatten()) for i in range(0, 120, 10)]


def reading_loss(model: Any, batch: Any) -> tuple[Tensor, Any]:
    letters, targets, hidden = batch
    output, hidden = model(letters, hidden)
    return F.cross_entropy(output, targets), hidden


def read(every: int | None, *, plain: bool) -> tuple[dict[str, Any], Any]:
    """Two passes over the text, in which each chunk begins with the hidden state that the last one ended in."""
    torch.manual_seed(0)
    train, val, model = chunks(text()), [(*chunk, None) for chunk in chunks(text())], Reader()
    decay = WeightDecay(model, start=START)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)

    def train_loss(model: Any, hparams: Any, batch: Any) -> tuple[Tensor, Any]:
        loss, hidden = reading_loss(model, batch)
        return loss + hparams.penalty(model), hidden

    def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return reading_loss(model.eval(), batch)[0]

    if plain:
        decay.requires_grad_(False)
    else:
        problem = hoptim.Problem(model, decay, train_loss, val_loss, has_aux=True)
        outer = decay.optimizer(lr=0.01)  # a tenth, for a training of twenty steps
        optimizer = Watched(optimizer, outer, problem, val_batches=val, every=every, warmup=6)
    losses = []
    for _ in range(2):
        hidden: Any = None
        for letters, targets in train:
            hidden = None if hidden is None else tuple(part.detach() for part in hidden)
            optimizer.zero_grad()
            if plain:
                output, hidden = model(letters, hidden)
                loss = F.cross_entropy(output, targets) + decay.penalty(model)
            else:
                loss, hidden = optimizer.loss((letters, targets, hidden))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            losses.append(loss.item())
    return {"model": model.state_dict(), "losses": losses, "hidden": hidden}, optimizer


def test_a_language_model_with_a_hidden_state_has_the_bits_of_its_plain_loop() -> None:
    assert same(read(None, plain=False)[0], read(None, plain=True)[0])


def test_hypersteps_of_a_language_model_begin_with_the_hidden_state_of_their_chunk() -> None:
    found, optimizer = read(5, plain=False)
    check_hypersteps(optimizer, lambda model, batch: reading_loss(model, batch)[0], 3)
    assert any(batch[2] is not None for _, _, batch, _, _ in optimizer.seen)
    assert found["losses"][-1] < 0.9 * found["losses"][0]


# An image classifier: mixup, label smoothing, clipping, an average of the weights, a schedule, accuracies for the log ------


def images(n: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % 4
    stripes = torch.sin(torch.arange(8) * (1.0 + labels[:, None]))
    return stripes[:, None, None, :] + torch.randn(n, 1, 8, 8), labels


def network() -> nn.Module:
    first, second = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.Conv2d(6, 8, 3, stride=2)
    parts = (first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(72, 4))
    return nn.Sequential(*parts)


def mixed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    share, targets = torch.distributions.Beta(0.4, 0.4).sample(), F.one_hot(y, 4).float()
    return x.lerp(x.roll(1, 0), share), targets.lerp(targets.roll(1, 0), share)


def classify(every: int | None, *, plain: bool) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(0)
    (x, y), val, model = images(64), [images(32), images(32)], network()
    decay = WeightDecay(model, per="channel", start=START)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model.eval()(batch[0]), batch[1])

    if plain:
        decay.requires_grad_(False)
    else:
        fit = hoptim.CompositeLoss(lambda m, h, b: m(b[0]), lambda z, h, b: criterion(z, b[1]), lambda m, h: h.penalty(m))
        problem = hoptim.Problem(model, decay, fit, val_loss, has_aux=True)
        optimizer = Watched(optimizer, decay.optimizer(), problem, val_batches=val, every=every, warmup=8)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [4])
    accuracies = []
    for _ in range(6):
        for index in torch.randperm(64).split(16):
            image, target = mixed(x[index], y[index])
            if plain:
                output = model(image)
                loss = criterion(output, target) + decay.penalty(model)
            else:
                loss, output = optimizer.loss((image, target))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            average.update_parameters(model)
            schedule.step()
            accuracies.append((output.argmax(1) == target.argmax(1)).float().mean().item())
    return {"model": model.state_dict(), "average": average.state_dict(), "accuracies": accuracies}, optimizer


def test_an_image_classifier_with_all_extras_has_the_bits_of_its_plain_loop() -> None:
    assert same(classify(None, plain=False)[0], classify(None, plain=True)[0])


def test_hypersteps_of_an_image_classifier_see_the_mixed_batch_and_smoothed_labels() -> None:
    found, optimizer = classify(4, plain=False)

    def smoothed(model: nn.Module, batch: Any) -> Tensor:
        image, target = batch
        return -((0.9 * target + 0.1 / 4) * model(image).log_softmax(1)).sum(1).mean()

    check_hypersteps(optimizer, smoothed, 5)
    assert sum(found["accuracies"][-4:]) > sum(found["accuracies"][:4])


# A GPT: batches drawn by a function, accumulation, bf16, a schedule that is written into the groups ------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.mix(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class GPT(nn.Module):
    def __init__(self, letters: int = 8, length: int = 12, width: int = 16) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Embedding(length, width)
        self.blocks, self.norm = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        self.head.weight = self.letters.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        found = self.blocks(self.letters(x) + self.places.weight[: x.shape[1]])
        return F.cross_entropy(self.head(self.norm(found)).flatten(0, 1), y.flatten())


def write(every: int | None, *, plain: bool) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(0)
    streams, model = {"train": text()[:, 0], "val": text()[:, 1]}, GPT()
    decay = WeightDecay(model, start=START)

    def get_batch(split: str) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(streams[split]) - 12, (8,))
        return tuple(torch.stack([streams[split][i + shift : i + shift + 12] for i in starts]) for shift in (0, 1))

    def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return model.eval()(*batch)

    def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return model(*batch) + hparams.penalty(model)

    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) is wide]} for wide in (True, False)]
    optimizer: Any = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0, fused=True)
    if plain:
        decay.requires_grad_(False)
    else:
        problem = hoptim.Problem(model, decay, train_loss, val_loss)
        optimizer = Watched(
            optimizer, decay.optimizer(), problem, val_batches=lambda: get_batch("val"), every=every, warmup=6
        )
    low = torch.autocast("cpu", torch.bfloat16)
    losses = []
    for step in range(16):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / 4)
        for _ in range(2):
            batch = get_batch("train")
            with low:
                loss = model(*batch) + decay.penalty(model) if plain else optimizer.loss(batch)
            (loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return {"model": model.state_dict(), "losses": losses, "drawn": torch.rand(3)}, optimizer


def test_a_gpt_has_the_bits_of_its_plain_loop() -> None:
    assert same(write(None, plain=False)[0], write(None, plain=True)[0])


def test_hypersteps_of_a_gpt_draw_their_batches_aside_and_move_each_decay() -> None:
    (found, optimizer), (expected, _) = write(5, plain=False), write(None, plain=True)
    assert [record.moved for *_, record in optimizer.seen] == [True, True]
    assert found["losses"][:10] == expected["losses"][:10]  # up to the first hyperstep, with the same batches and masks
    assert torch.equal(found["drawn"], expected["drawn"])
    for *_, record in optimizer.seen:
        assert all((value / START).log().abs() > 1e-3 for value in record.hyperparameters.values())
    assert found["losses"][-1] < 0.9 * found["losses"][0]
