"""Sentences of four sources, and the last layer of MiniLM that tells which of them a sentence is from.

The layers below are frozen, so that their outputs are computed once. The classifier reads the first token alone, and so its
last layer computes no other token's output: keys and values are of all tokens, all else is of one.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, EACH = 24, 300  # of a sentence, the first ones; sentences of a source


class LastLayer(nn.Module):
    """A layer of BERT for the first token, and a linear classifier of four sources."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        own, output = layer.attention.self, layer.attention.output
        self.heads = own.num_attention_heads
        self.query, self.key, self.value, self.out, self.norm = own.query, own.key, own.value, output.dense, output.LayerNorm
        self.up, self.down, self.norm_of_output = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm
        self.head = nn.Linear(self.up.in_features, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of inputs of shape (sentences, tokens, features)."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the whole layer of BERT has at the first token."""
        first = x[:, 0]
        query, keys, values = (t.unflatten(-1, (self.heads, -1)) for t in (self.query(first), self.key(x), self.value(x)))
        scores = torch.einsum("bhf,bthf->bht", query, keys) / math.sqrt(query.shape[-1])
        attended = torch.einsum("bht,bthf->bhf", scores.softmax(-1), values).flatten(1)
        h = self.norm(first + self.out(attended))
        return self.norm_of_output(h + self.down(F.gelu(self.up(h))))


@cache
def bert(root: Path) -> tuple[Any, Any]:
    """The trained model and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = root / "minilm"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: it holds the files of sentence-transformers/all-MiniLM-L6-v2")
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval(), AutoTokenizer.from_pretrained(folder)


def last_layer(root: Path) -> nn.Module:
    """As it was trained, with a new classifier."""
    from transformers.models.bert.modeling_bert import BertLayer

    trained = bert(root)[0]
    layer = BertLayer(trained.config)
    layer.load_state_dict(trained.encoder.layer[-1].state_dict())
    return LastLayer(layer)


def texts(root: Path) -> list[list[str]]:
    """Addresses of 1790 to 1850, of 1915 to 1960 and of 1961 to 1992, one a line, and Moby-Dick."""
    early, late = ((root / "text" / name).read_text().splitlines() for name in ("train.txt", "valid.txt"))
    novel = " ".join((root / "text" / "moby_dick.txt").read_text().split())
    return [early[:61], early[-46:], late, [novel]]


@cache
def sentences(root: Path) -> tuple[Tensor, Tensor]:
    """What the frozen layers make of the sentences, and where these are from."""
    model, tokenizer = bert(root)
    draw, found = torch.Generator().manual_seed(0), []
    for source in texts(root):
        split = [one for text in source for one in re.split(r"(?<=[.!?])\s+", text) if len(one.split()) >= TOKENS - 2]
        order = torch.randperm(len(split), generator=draw)[:EACH].tolist()
        found += [split[place] for place in order]
    tokens = tokenizer(found, truncation=True, max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        x = [
            model(ids, output_hidden_states=True).hidden_states[-2] for ids in tokens["input_ids"].split(100)
        ]  # all are of the same length
    return torch.cat(x), torch.arange(4).repeat_interleave(EACH)
