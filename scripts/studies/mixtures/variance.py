"""How much does a gradient vary from batch to batch, if the mixture is sampled, and if it is weighted in the loss?

    python scripts/studies/mixtures/variance.py --data data

The mixtures are those that run.py has found; the model is half-way through a training on each.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.records import read_records
from studies.mixtures.model import BATCH, STEPS, Rows, losses, trained
from studies.mixtures.run import LEARNED, TARGETS
from studies.mixtures.sources import texts

import hoptim

BATCHES = 100


def variance(model: nn.Module, batches: DataLoader, p: Tensor) -> float:
    """The mean squared distance of a batch's gradient from the mean of all."""
    found = []
    for rows, source, share in islice(batches, BATCHES):
        loss = (p[source] / share * losses(model, rows)).mean()
        found.append(nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))))
    gradients = torch.stack(found)
    return float((gradients - gradients.mean(0)).square().sum(1).mean()) * BATCHES / (BATCHES - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets; default: data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_records(Path(__file__).with_name("rows.json"))
    for target in TARGETS:
        mixture = next(r["mixture"] for r in rows if (r["way"], r["target"], r["seed"]) == (LEARNED, target, 0))
        sources, _ = texts(options.data, 0)
        model, p = trained(sources, mixture, 0, STEPS // 2), torch.tensor(list(mixture.values()))
        found = []
        for probabilities in (mixture, None):  # sampled by p, and all sources alike
            stream = hoptim.Mixture({name: Rows(text) for name, text in sources.items()}, probabilities)
            found.append(variance(model, DataLoader(stream, batch_size=BATCH), p))
        kish = float((p.square() * len(p)).sum())
        print(f"{target}: weighted over sampled {found[1] / found[0]:.1f}, by Kish's formula {kish:.1f}")


if __name__ == "__main__":
    main()
