"""Influence by kronfluence (EKFAC), with the scores' sign as hoptim's: low where an example helps."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def kronfluence(
    model: nn.Module, train: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor] | None, damping: float | None = None
) -> Tensor:
    """Scores of the queries' losses, of shape (queries, examples); without queries, each example's on its own loss.

    The options are kronfluence's own, but for the damping: ``None`` is a tenth of the mean eigenvalue of each layer.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classes(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            z = model(batch[0])
            labels = torch.multinomial(z.detach().softmax(-1), 1).flatten() if sample else batch[1]
            return F.cross_entropy(z, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        task = Classes()
        analyzer = Analyzer(
            "influence", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True, log_level=40
        )
        options = {"per_device_train_batch_size": 250, "score_args": ScoreArguments(damping_factor=damping)}
        analyzer.fit_all_factors(
            "factors", TensorDataset(*train), per_device_batch_size=250, factor_args=FactorArguments(strategy="ekfac")
        )
        if queries is None:
            analyzer.compute_self_scores("scores", "factors", TensorDataset(*train), **options)
            found = analyzer.load_self_scores("scores")
        else:
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                TensorDataset(*queries),
                TensorDataset(*train),
                per_device_query_batch_size=100,
                **options,
            )
            found = analyzer.load_pairwise_scores("scores")
    logging.disable(logging.NOTSET)
    return -found["all_modules"].float()
