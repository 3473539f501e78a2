"""A small GPT over bytes, its training on a fixed mixture, and bits a byte on a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import hoptim

LENGTH, WIDTH, LAYERS, HEADS = 64, 64, 2, 4
STEPS, BATCH, RATE, RISING = 500, 32, 3e-3, 50


class Rows(Dataset[Tensor]):
    """The pieces of a text of LENGTH bytes and the one after them, from each place."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return len(self.text) - LENGTH

    def __getitem__(self, place: int) -> Tensor:
        return self.text[place : place + LENGTH + 1]


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.attend(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    """Logits of the next byte for each byte, of shape (B, T, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.last = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.bytes(x) + self.places.weight)))


def of_rows(z: Tensor, rows: Tensor) -> Tensor:
    """The mean loss of each row."""
    return F.cross_entropy(z.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)


def losses(model: Any, rows: Tensor) -> Tensor:
    return of_rows(model(rows[:, :-1]), rows)


@torch.no_grad()
def bits(model: nn.Module, text: Tensor, count: int = 768) -> float:
    """Bits a byte on pieces that are evenly spread over a text."""
    places = torch.linspace(0, len(text) - LENGTH - 1, count).long()[:, None]
    found = [losses(model, rows) for rows in text[places + torch.arange(LENGTH + 1)].split(128)]
    return float(torch.cat(found).mean()) / math.log(2)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / RISING, 1 - n / steps))


def fresh(seed: int) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = GPT()
    return model, torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)


def trained(
    sources: dict[str, Tensor],
    mixture: dict[str, float],
    seed: int,
    steps: int = STEPS,
    each: Callable[[GPT, Tensor, Tensor], Tensor] | None = None,
) -> GPT:
    """A model trained on rows drawn by these probabilities; ``each(model, rows, source)`` has another loss than the mean."""
    model, optimizer = fresh(seed)
    rates = schedule(optimizer, steps)
    stream = hoptim.Mixture({name: Rows(text) for name, text in sources.items()}, mixture, seed=seed)
    for _, (rows, source, _) in zip(range(steps), DataLoader(stream, batch_size=BATCH), strict=False):
        optimizer.zero_grad()
        (losses(model, rows).mean() if each is None else each(model, rows, source)).backward()
        optimizer.step()
        rates.step()
    return model
