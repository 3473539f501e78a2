"""Fine-tune MiniLM to classify passages by era, with a learned decay of each layer towards its pretrained weights.

    python scripts/minilm.py --model data/minilm --text data/text/sotu.txt --seeds 2 --out minilm.png

The passages are from the State of the Union addresses. There are three trainings for each seed: without a decay, with one
fixed decay for all layers, and with a decay for each layer that is learned from there. ``--text`` is a file with an address
on each line, 1790 to 2021; ``--model`` is a folder or a name on the Hugging Face hub. A training takes minutes.
"""

import argparse
import statistics
import time
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.distributions import constraints
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import hoptim

ERAS = ("1790–1829", "1830–1869", "1870–1909", "1910–1949", "1950–1989")
YEARS = sorted([*({*range(1790, 2022)} - {1933}), 1953, 1961])  # of each line: no address in 1933, two in 1953 and in 1961
PARTS = {"train": 0.6, "val": 0.2, "test": 0.2}  # the shares of an era's addresses; no address is in two parts


def passages(path, tokenizer, length):
    """The passages by era and address; each has ``length`` tokens, including the two special ones."""
    found = [[] for _ in ERAS]
    with open(path, encoding="utf-8") as text:
        for year, address in zip(YEARS, text, strict=False):
            if (era := (year - 1790) // 40) < len(ERAS):
                ids = torch.tensor(tokenizer(address, add_special_tokens=False)["input_ids"])
                whole = ids[: len(ids) // (length - 2) * (length - 2)].view(-1, length - 2)
                begun = F.pad(whole, (1, 0), value=tokenizer.cls_token_id)
                found[era].append(F.pad(begun, (0, 1), value=tokenizer.sep_token_id))
    return found


def split(eras, sizes, seed):
    """The passages of each part and their eras, the same number from each era."""
    draw, parts = torch.Generator().manual_seed(seed), {part: [] for part in PARTS}
    for era, addresses in enumerate(eras):
        order, first = torch.randperm(len(addresses), generator=draw).tolist(), 0
        for part, share in PARTS.items():
            last = first + round(share * len(order))
            pool = torch.cat([addresses[i] for i in order[first:last]])
            chosen = pool[torch.randperm(len(pool), generator=draw)[: sizes[part] // len(ERAS)]]
            parts[part].append((chosen, torch.full((len(chosen),), era)))
            first = last
    return {part: tuple(map(torch.cat, zip(*found, strict=True))) for part, found in parts.items()}


def batches(part, size):
    """The batches of an epoch, in a new order."""
    return [(part[0][index], part[1][index]) for index in torch.randperm(len(part[0])).split(size)]


class Classifier(nn.Module):
    """MiniLM's sentence vectors (the mean of the last hidden states) and a new linear head."""

    def __init__(self, name):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(name)
        self.encoder.pooler = None
        self.encoder.get_input_embeddings().requires_grad_(False)  # they are half of all weights, and most words are rare
        self.head = nn.Linear(self.encoder.config.hidden_size, len(ERAS))

    def forward(self, tokens):
        return self.head(self.encoder(tokens).last_hidden_state.mean(1))


def layer(name):
    """The layer that a weight belongs to: ``embeddings``, ``layer 1`` and so on, ``head``."""
    words = name.split(".")  # such as encoder.embeddings.LayerNorm.weight, encoder.encoder.layer.0.output.dense.weight
    return f"layer {int(words[3]) + 1}" if words[2:3] == ["layer"] else words[words[0] == "encoder"]


def anchored(model):
    """The penalty ½ Σ decay·‖w − w₀‖² over layers, where w₀ are the weights as they are now: L2-SP (arXiv 1802.01483)."""
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def penalty(model, hparams):
        now = dict(model.named_parameters())
        return sum(0.5 * hparams[layer(name)] * (now[name] - old).square().sum() for name, old in start.items())

    return penalty


def predict(model, hparams, batch):
    return model(batch[0])


def criterion(logits, hparams, batch):
    return F.cross_entropy(logits, batch[1])


def val_loss(model, hparams, batch):
    return criterion(model.eval()(batch[0]), hparams, batch)


@torch.no_grad()
def evaluate(model, part):
    """Cross-entropy and accuracy on a part of the data."""
    model.eval()
    logits = torch.cat([model(tokens) for tokens in part[0].split(50)])
    return F.cross_entropy(logits, part[1]).item(), (logits.argmax(1) == part[1]).double().mean().item()


def train(options, parts, seed, decay, every, tick=lambda: None):
    """Train once from the pretrained weights; return the optimizer and the CPU seconds."""
    torch.manual_seed(seed)
    model = Classifier(options.model)
    layers = dict.fromkeys(layer(name) for name, p in model.named_parameters() if p.requires_grad)
    decays = {name: torch.tensor(decay or 1.0) for name in layers}
    hparams = hoptim.HyperParameters(decays, dict.fromkeys(layers, constraints.positive))
    loss = hoptim.CompositeLoss(predict, criterion, anchored(model) if decay else None)
    problem = hoptim.Problem(model, hparams, loss, val_loss)
    body = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [{"params": body, "lr": options.lr}, {"params": model.head.parameters(), "lr": 30 * options.lr}]
    inner, outer = torch.optim.AdamW(groups, weight_decay=0.0), torch.optim.Adam(hparams.parameters(), options.outer_lr)
    val = batches(parts["val"], 50)
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=val, every=every, warmup=options.steps // 5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    begun, left = time.process_time(), []
    model.train()
    for _ in range(options.steps):
        left = left or batches(parts["train"], options.batch)
        optimizer.zero_grad()
        optimizer.loss(left.pop()).backward()
        optimizer.step()
        scheduler.step()
        tick()
    return optimizer, time.process_time() - begun


def study(options):
    """Run all trainings; return the figures of each by name, a dict for each seed, and the learned decays."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    eras = passages(options.text, tokenizer, options.length)
    ways = {"no decay": (None, None), f"decay {options.decay:g}": (options.decay, None)}
    ways["learned a layer"] = (options.decay, options.every)
    figures, decays = {name: [] for name in ways}, []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(ways) * options.seeds * options.steps)
        for seed in range(options.seeds):
            parts = split(eras, {"train": options.train, "val": options.val, "test": options.test}, seed)
            for name, way in ways.items():
                progress.update(task, description=f"seed {seed}, {name}")
                optimizer, seconds = train(options, parts, seed, *way, tick=lambda: progress.advance(task))
                model, found = optimizer.problem.model, {}
                for part in PARTS:
                    found[f"{part} loss"], found[f"{part} acc"] = evaluate(model, parts[part])
                figures[name].append({**found, "seconds": seconds})
            decays.append({name: value.item() for name, value in dict(optimizer.problem.hparams).items()})
    return figures, decays


def table(figures):
    """Means over the seeds, with standard deviations if there are several, and the cost over a training without decay."""
    columns = [key for key in next(iter(figures.values()))[0] if key != "seconds"]
    shown = Table("", *columns, "cost")
    unit = statistics.fmean(run["seconds"] for run in next(iter(figures.values())))
    for name, runs in figures.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        shown.add_row(name, *cells, f"{statistics.fmean(run['seconds'] for run in runs) / unit:.2f}")
    return shown


def draw(decays, start, path):
    """Draw a bar for each layer, the geometric mean over the seeds, and a dot for each seed."""
    from matplotlib import pyplot as plt

    names = list(decays[0])
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    means = [statistics.geometric_mean(run[name] for run in decays) for name in names]
    axes.bar(names, means, color="#4477aa")
    for run in decays:
        axes.plot(names, list(run.values()), "k.", markersize=4)
    axes.axhline(start, color="#aa3377", linestyle="--", label="initial value")
    axes.set(yscale="log", ylabel="learned decay")
    axes.tick_params(axis="x", rotation=30)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="default: %(default)s")
    parser.add_argument("--text", required=True, help="the file of the addresses, the oldest first")
    parser.add_argument("--out", help="draw the learned decays into this file")
    defaults = {"seeds": 1, "steps": 60, "batch": 16, "train": 100, "val": 100, "test": 300, "length": 64, "every": 6}
    for name, default in {**defaults, "decay": 0.1, "lr": 1e-4, "outer-lr": 0.5}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    options = parser.parse_args(arguments)
    if options.out and not find_spec("matplotlib"):
        parser.error("--out draws with matplotlib, which is not installed: pip install '.[plots]'")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    figures, decays = study(options)
    console = Console()
    console.print(table(figures))
    for run in decays:
        console.print({name: float(f"{value:.2g}") for name, value in run.items()})
    if options.out:
        draw(decays, options.decay, options.out)
    return figures, decays


if __name__ == "__main__":
    main()
