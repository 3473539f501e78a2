"""How much of which text should a model of code train on? A learned mixture of four sources, in half a minute.

    python scripts/examples/mixture.py --out mixture.png

The sources are on every machine that runs this: modules of Python's library, headers of C++, Python's manual, and its
letters shuffled. The target is PyTorch's own code, of which the model never trains on a line. It prints what the mixture
gains over all sources alike, on files that nothing was chosen on, and draws the mixture over the steps.
"""

import argparse
import math
import random
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import hoptim

CONTEXT, WIDTH = 12, 96  # bytes that the model sees, and its units


def rows(data, size=400_000):
    """All pieces of a text, of the bytes that the model sees and the next one."""
    text = torch.frombuffer(bytearray(data[:size]), dtype=torch.uint8).long()
    return text.unfold(0, CONTEXT + 1, 1)


def read(folder, pattern):
    return b"".join(path.read_bytes() for path in sorted(Path(folder).glob(pattern))[:60])


def texts():
    """The sources by name, and the validation and the test text."""
    library, own = sysconfig.get_paths()["stdlib"], Path(torch.__file__).parent
    manual = read(library, "pydoc_data/topics.py")
    sources = {
        "Python's library": read(library, "*.py"),
        "C++ headers": read(own, "include/ATen/*.h"),
        "Python's manual": manual,
        "its letters shuffled": bytes(random.Random(0).sample(manual, 400_000)),
    }
    return (
        {name: rows(text) for name, text in sources.items()},
        rows(read(own, "nn/modules/*.py")),
        rows(read(own, "optim/*.py")),
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, WIDTH), nn.GELU(), nn.Linear(WIDTH, 256)
    )  # fmt: skip


def losses(model, rows):
    """The loss of each row."""
    return F.cross_entropy(model(rows[:, :-1]), rows[:, -1], reduction="none")


def trained(mixture, steps):
    """A model that is trained on a fixed mixture."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _, (batch, *_) in zip(range(steps), DataLoader(mixture, batch_size=128), strict=False):
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    return model


def learned(sources, unseen, steps):
    """The mixture after each hyperstep of a training."""
    model = network()
    mixture, hparams = hoptim.Mixture(sources), hoptim.recipes.DomainWeights(dict.fromkeys(sources, 1))

    def train_loss(model, hparams, batch):
        rows, source, share = batch
        return hparams.mean(losses(model, rows), source, share)

    def val_loss(model, hparams, rows):
        return losses(model, rows).mean()

    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    path = [hparams.probabilities]

    def follow(record):
        mixture.update(hparams["mixture"])
        path.append(hparams.probabilities)

    optimizer = hoptim.BilevelOptimizer(
        torch.optim.Adam(model.parameters(), lr=2e-3),
        hparams.optimizer(),
        problem,
        val_batches=DataLoader(unseen, batch_size=256, shuffle=True),
        train_batches=DataLoader(hoptim.Mixture(sources, seed=1), batch_size=256),
        every=20,
        warmup=steps // 8,
        hooks=[follow],
    )
    for _, batch in zip(range(steps), DataLoader(mixture, batch_size=128), strict=False):
        optimizer.zero_grad()
        optimizer.loss(batch).backward()
        optimizer.step()
    return path


def draw(path, out):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names = list(path[0])
    axis.stackplot(range(len(path)), *([one[name] for one in path] for name in names), labels=names)
    axis.set(xlabel="hyperstep", ylabel="share of each source", xlim=(0, len(path) - 1), ylim=(0, 1))
    figure.legend(loc="outside right upper")
    figure.savefig(out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mixture.png"), help="the picture; default: mixture.png")
    parser.add_argument("--steps", type=int, default=1000, help="of each of the three trainings; default: 1000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources, unseen, test = texts()
    path = learned(sources, unseen, options.steps)
    print("learned:", ", ".join(f"{name} {share:.2f}" for name, share in path[-1].items()))
    for way, shares in (("all alike", None), ("learned", path[-1])):
        model = trained(hoptim.Mixture(sources, shares), options.steps)
        with torch.no_grad():
            print(f"{way}: {losses(model, test[::20]).mean() / math.log(2):.3f} bits a byte on the test text")
    draw(path, options.out)
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
