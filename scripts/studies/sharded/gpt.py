"""A small GPT over bytes, whose blocks are sharded over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F


class Block(nn.Module):
    """Attention with 8 heads and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The next values of x, of shape (B, T, width)."""
        q, k, v = (part.unflatten(-1, (8, -1)).transpose(1, 2) for part in self.attend(self.first(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    """Logits of the next byte for each byte."""

    def __init__(self, width: int, layers: int, length: int = 128) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, of shape (B, T, 256), of bytes of shape (B, T)."""
        h = self.bytes(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.last(h))


def sharded(width: int, layers: int, ranks: int, seed: int) -> GPT:
    """The model with its blocks sharded, the same on any number of ranks; the whole one is never in memory."""
    with torch.device("meta"):
        model = GPT(width, layers)
    mesh = init_device_mesh("cpu", (ranks,))
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        whole = torch.zeros(p.shape)
        if p.ndim > 1:
            whole.normal_(std=0.02)
        elif "weight" in name:
            whole.fill_(1)
        own = p.to_local()  # type: ignore[attr-defined]
        own.detach().copy_(whole.chunk(ranks)[mesh.get_rank()] if len(own) else own.detach())
    return model


def each(logits: Tensor, x: Tensor) -> Tensor:
    """The mean loss of each row of bytes x, of shape (B, T + 1), given the logits of all but its last byte."""
    return F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").mean(1)
