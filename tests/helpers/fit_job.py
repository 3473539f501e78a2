"""A cross-validated fit for a test that kills it: dropout, momentum, a schedule and a loader that shuffles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import hoptim

EPOCHS, N = 16, 60


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(N, 4)
    y = (x[:, 0] + 0.5 * torch.randn(N) > 0).long()
    data = TensorDataset(x, y)

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))

    def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model.eval()(batch[0]), batch[1])

    def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + hparams.penalty(model)

    def train(model: Any, optimizer: Any, examples: Tensor) -> None:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        loader = DataLoader(Subset(data, examples.tolist()), batch_size=8, shuffle=True)
        for _ in optimizer.resumable(range(EPOCHS), scheduler):
            model.train()
            for batch in loader:
                optimizer.zero_grad()
                optimizer.loss(batch).backward()
                optimizer.step()
            scheduler.step()

    cv = hoptim.CrossValidated(
        make,
        hoptim.recipes.WeightDecay(make(), start=1e-3),
        train_loss,
        val_loss,
        inner=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        examples=N,
        steps=lambda n: EPOCHS * -(-n // 8),
        val_batches=lambda held_out: [(x[held_out], y[held_out])],
        hypersteps=8,
    )
    found = cv.fit(train, checkpoint=folder / "fit.pt", every_seconds=0)
    rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in found.history]
    models = [dict(model.state_dict()) for model in (found.model, *found.models)]
    torch.save({"rows": rows, "models": models, "learned": found.hyperparameters}, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
