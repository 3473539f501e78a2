"""Influence by kronfluence (EKFAC) and by TRAK, with the scores' sign as hoptim's: low where an example helps."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
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


def trak(
    models: Sequence[nn.Module],
    train: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    dimensions: int,
    damping: float = 0.0,
) -> Tensor:
    """Scores of the queries' losses, of shape (queries, examples), by all of these models together.

    The options are TRAK's own, but for float32, how many ``dimensions`` gradients are projected to, and the ``damping`` that
    is added to their second moments, its ``lambda_reg``.
    """
    from trak import TRAKer
    from trak.projectors import BasicProjector

    size = sum(w.numel() for w in models[0].parameters())
    # In two blocks at least: with one, the default up to 100 dimensions, it fails once features are finalized.
    projector = BasicProjector(size, dimensions, 0, "normal", torch.device("cpu"), block_size=min(100, dimensions // 2))
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # its bars of progress
        traker = TRAKer(
            models[0], "image_classification", len(train[0]), folder, device="cpu", projector=projector,
            use_half_precision=False, logging_level=logging.ERROR, lambda_reg=damping,
        )  # fmt: skip
        states = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
        for number, state in enumerate(states):
            traker.load_checkpoint(state, model_id=number)
            for x, y in zip(train[0].split(250), train[1].split(250), strict=True):
                traker.featurize((x, y), num_samples=len(x))
        traker.finalize_features()
        for number, state in enumerate(states):
            traker.start_scoring_checkpoint("queries", state, number, len(queries[0]))
            traker.score(queries, num_samples=len(queries[0]))
        return -torch.tensor(traker.finalize_scores("queries")).T
