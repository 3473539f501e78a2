"""A language model: an LSTM on text, with the seven regularisers of Merity et al. as hyperparameters."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

import hoptim
from tasks.task import Task

FILES = {"train": "train.txt", "val": "valid.txt", "test": "test.txt"}
RATES = ("input", "hidden", "output", "embedding", "weight")
PENALTIES = ("activation", "temporal")


@dataclass(kw_only=True)
class Language(Task):
    """An LSTM of two layers that predicts the next word of a text. A batch is a vector with the indices of its sequences.

    L_T = mean cross-entropy + α·mean(a²) + β·mean((h_t − h_{t−1})²), where h is the last layer's output before dropout and
    a after it; L_V is the mean cross-entropy without penalties and dropout. Perplexity is exp of the mean cross-entropy.

    Args:
        root: the folder of train.txt, valid.txt and test.txt.
        train: how many training sequences are drawn from train.txt.
        val: how many validation sequences are drawn from valid.txt.
        test: how many test sequences are drawn from test.txt.
        length: words in a sequence.
        vocabulary: how many words are known: the most frequent ones of train.txt, and one word for all others.
        hidden: units of an embedding and of a layer.
        per: ``layer``, five rates; or ``unit``: a rate for each unit of the inputs, hidden states and outputs, for each word
            of the embedding, and for each hidden-to-hidden weight.
        start: the rates and penalties at their start, by name.
        temperature: τ of the relaxed dropout masks.

    Source: Merity, Keskar and Socher 2018, Regularizing and optimizing LSTM language models (arXiv 1708.02182).
    """

    root: str = "data/text"
    train: int = 600
    val: int = 400
    test: int = 800
    length: int = 15
    vocabulary: int = 1000
    hidden: int = 64
    per: str = "layer"
    start: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in ("layer", "unit"):
            raise ValueError(f"task.per={self.per!r}: give layer or unit")
        if set(self.start) != {*RATES, *PENALTIES}:
            raise ValueError(
                f"task.start has {sorted(self.start)}: give one number each to {', '.join((*RATES, *PENALTIES))}"
            )

    def setup(self, seed: int) -> dict[str, Tensor]:
        """Read the three files, and draw sequences from each, by the seed."""
        self.words, texts = corpus(self.root, self.vocabulary)
        generator, drawn = torch.Generator().manual_seed(seed), []
        for part, text in texts.items():
            drawn.append(draw(text, getattr(self, part), self.length + 1, generator, part))
        self.tokens = torch.cat(drawn)
        return dict(zip(texts, torch.arange(len(self.tokens)).split([len(part) for part in drawn]), strict=True))

    def model(self) -> nn.Module:
        return LanguageModel(len(self.words), self.hidden)

    def hparams(self, model: nn.Module) -> hoptim.HyperParameters:
        """Five rates of dropout, each one number or one for each unit, and two penalties."""
        H, V = self.hidden, len(self.words)
        shapes = {"input": (H,), "hidden": (H,), "output": (H,), "embedding": (V, 1), "weight": (2, 4 * H, H)}
        values = {f"rate.{n}": torch.full(shapes[n] if self.per == "unit" else (), float(self.start[n])) for n in RATES}
        kinds = dict.fromkeys(values, constraints.unit_interval) | dict.fromkeys(PENALTIES, constraints.positive)
        return hoptim.HyperParameters(values | {n: torch.tensor(float(self.start[n])) for n in PENALTIES}, kinds)

    @property
    def train_loss(self) -> hoptim.CompositeLoss:
        return hoptim.CompositeLoss(self.predict, self.criterion)

    def masks(self, hparams: Any, count: int) -> dict[str, Tensor]:
        """The dropout masks of a training step on ``count`` sequences; they are the same for all words of a sequence."""
        H, V = self.hidden, len(self.words)
        shapes = dict.fromkeys(("input", "hidden", "output"), (count, 1, H)) | {"embedding": (V, 1), "weight": (2, 4 * H, H)}
        return {name: kept(hparams[f"rate.{name}"], shapes[name], self.temperature) for name in RATES}

    def predict(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """Logits, the last layer's output after dropout, and the output before it, side by side."""
        return torch.cat(model(self.tokens[batch, :-1], self.masks(hparams, len(batch))), dim=-1)

    def criterion(self, z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        """Cross-entropy and the two penalties of activations, which are convex in z."""
        logits, left, output = z.split([len(self.words), self.hidden, self.hidden], dim=-1)
        changes = output[:, 1:] - output[:, :-1]
        penalties = hparams["activation"] * left.square().mean() + hparams["temporal"] * changes.square().mean()
        return self.cross_entropy(logits, batch) + penalties

    def cross_entropy(self, logits: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), self.tokens[batch, 1:].flatten())

    def val_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """The cross-entropy without dropout."""
        return self.cross_entropy(model(self.tokens[batch, :-1])[0], batch)

    def figures(self, model: nn.Module, hparams: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, and the share of words to which the model gives the highest probability."""
        logits = model(self.tokens[batch, :-1])[0]
        found = (logits.argmax(-1) == self.tokens[batch, 1:]).double().mean()
        return {"loss": self.cross_entropy(logits, batch), "accuracy": found}

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return []  # the weights of the cells are used without calling them, so that nothing else would gather them

    def of_means(self, means: Mapping[str, float]) -> dict[str, float]:
        """The perplexity."""
        return {"perplexity": math.exp(min(means["loss"], 700.0))}


class LanguageModel(nn.Module):
    """Embedding, an LSTM of two layers from a zero state, and a linear decoder."""

    def __init__(self, words: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, hidden)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.cells = nn.ModuleList(nn.LSTMCell(hidden, hidden) for _ in range(2))
        self.decoder = nn.Linear(hidden, words)

    def forward(self, tokens: Tensor, masks: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the last layer's output after dropout, and before it. Without masks nothing is dropped."""
        words = self.embedding.weight if masks is None else self.embedding.weight * masks["embedding"]
        x = F.embedding(tokens, words)
        for number, (cell, place) in enumerate(zip(self.cells, ("input", "hidden"), strict=True)):
            before = x if masks is None else x * masks[place]
            x = recurrent(cell, before, None if masks is None else masks["weight"][number])
        left = x if masks is None else x * masks["output"]
        return self.decoder(left), left, x


def recurrent(cell: nn.LSTMCell, x: Tensor, mask: Tensor | None) -> Tensor:
    """The cell's outputs over time, with its hidden-to-hidden weights times the mask; has second derivatives everywhere."""
    u = cell.weight_hh if mask is None else cell.weight_hh * mask
    state = x.new_zeros(2, len(x), cell.hidden_size).unbind()
    outputs = []
    for now in x.unbind(1):
        state = torch.lstm_cell(now, state, cell.weight_ih, u, cell.bias_ih, cell.bias_hh)
        outputs.append(state[0])
    return torch.stack(outputs, 1)


def kept(rate: Tensor, shape: tuple[int, ...], temperature: float) -> Tensor:
    """Dropout masks that have a derivative in the rate p: (1 − s)/(1 − p), s = sigmoid((logit p + logit u)/τ), u uniform.

    Source: Gal, Hron and Kendall 2017, Concrete dropout (arXiv 1705.07832); the same relaxation as hoptim.recipes.Dropout.
    """
    u = torch.rand(shape, dtype=rate.dtype, device=rate.device).clamp(min=torch.finfo(rate.dtype).tiny)
    return (1 - torch.sigmoid((torch.logit(rate) + torch.logit(u)) / temperature)) / (1 - rate)


@lru_cache(maxsize=1)
def corpus(root: str, size: int) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The vocabulary, and the text of each part as the numbers of its words."""
    words = {part: words_of(Path(root, name)) for part, name in FILES.items()}
    vocabulary = vocabulary_of(words["train"], size)
    return vocabulary, {part: torch.tensor([vocabulary.get(word, 0) for word in text]) for part, text in words.items()}


def words_of(path: Path) -> list[str]:
    """The words and punctuation marks of a text, in lower case.

    >>> words_of(Path("nowhere/train.txt"))
    Traceback (most recent call last):
    FileNotFoundError: nowhere/train.txt is not there: put plain text into train.txt, valid.txt and test.txt ...
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: put plain text into train.txt, valid.txt and test.txt of task.root={str(path.parent)!r}, "
            "such as the three parts of Penn Treebank, or 80, 10 and 10 % of any books"
        )
    return re.findall(r"<unk>|\w+|[^\w\s]", path.read_text(encoding="utf-8").lower())


def vocabulary_of(words: list[str], size: int) -> dict[str, int]:
    """A number for each of the most frequent words; 0 is for all others.

    >>> vocabulary_of("a b a c a b".split(), 3)
    {'<unk>': 0, 'a': 1, 'b': 2}
    """
    frequent = (word for word, _ in Counter(words).most_common(size) if word != "<unk>")
    return {word: number for number, word in enumerate(["<unk>", *islice(frequent, size - 1)])}


def draw(text: Tensor, count: int, length: int, generator: torch.Generator, part: str) -> Tensor:
    """Random pieces of the text, ``count`` of this length, which do not overlap."""
    pieces = text[: len(text) // length * length].view(-1, length)
    if not 1 <= count <= len(pieces):
        raise ValueError(f"task.{part}={count}: {FILES[part]} has {len(pieces)} sequences of {length} words")
    return pieces[torch.randperm(len(pieces), generator=generator)[:count]]
