"""Ways to find a mixture of sources: by a guess, by small trainings, and by hypergradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from studies.mixtures.model import (
    BATCH,
    GPT,
    LENGTH,
    STEPS,
    Rows,
    bits,
    fresh,
    losses,
    of_rows,
    schedule,
    trained,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hoptim
from hoptim.recipes import DomainWeights

Shares = dict[str, float]
Sources = dict[str, Tensor]
WARMUP, EVERY, HYPER_BATCH = 60, 10, 64
PROXIES, PROXY_STEPS = 32, STEPS // 4
DRO_RATE, DRO_SMOOTHING = 0.1, 0.01
PRECONDITIONED = hoptim.Implicit(hoptim.Identity(), preconditioner=hoptim.SecondMoments())  # one step of Adam ahead


def shares(sources: Sources, numbers: Any) -> Shares:
    """Numbers in the order of the sources, by name, such that they add up to 1."""
    found = np.asarray(numbers, dtype=float)
    return dict(zip(sources, (found / found.sum()).tolist(), strict=True))


def by_classifier(sources: Sources, target: Tensor, seed: int, count: int = 1000) -> Shares:
    """The sources of the tenth of all pieces that look most like the target, by logistic regression on groups of letters.

    That is how DataComp-LM chooses documents (Li et al. 2024, arXiv 2406.11794, section 4.4).
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    draw = torch.Generator().manual_seed(seed)

    def pieces(text: Tensor, number: int) -> list[str]:
        places = torch.randint(len(text) - 4 * LENGTH, (number,), generator=draw).tolist()
        return [bytes(text[place : place + 4 * LENGTH].tolist()).decode("latin-1") for place in places]

    vectors = HashingVectorizer(analyzer="char", ngram_range=(1, 4), n_features=2**16)
    few = count // len(sources)
    x = [*pieces(target, count), *(one for text in sources.values() for one in pieces(text, few))]
    model = LogisticRegression(max_iter=300).fit(vectors.transform(x), [1] * count + [0] * few * len(sources))
    pool = [one for text in sources.values() for one in pieces(text, count // 2)]
    kept = model.predict_proba(vectors.transform(pool))[:, 1].argsort()[-len(pool) // 10 :]
    return shares(sources, np.bincount(kept // (count // 2), minlength=len(sources)))


def by_regmix(sources: Sources, targets: dict[str, Tensor], seed: int) -> dict[str, Shares]:
    """RegMix (Liu et al. 2024, arXiv 2407.01492): a regression on the losses of small trainings on random mixtures.

    The mixtures come from Dirichlet distributions of several widths around all alike. A ridge regression of the loss, on the
    shares and their square roots, is asked for 100,000 others, and the mean of the best 100 is taken.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    draw, k = np.random.default_rng(seed), len(sources)

    def mixtures(count: int) -> Any:
        return np.stack([draw.dirichlet(np.full(k, draw.uniform(0.1, 2.0))) for _ in range(count)])

    tried = mixtures(PROXIES)
    models = [trained(sources, shares(sources, one), seed + n, PROXY_STEPS) for n, one in enumerate(tried)]
    asked, found = mixtures(100_000), {}
    for name, text in targets.items():
        regression = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 3, 13)))
        regression.fit(np.hstack([tried, np.sqrt(tried)]), [bits(model, text, 256) for model in models])
        best = regression.predict(np.hstack([asked, np.sqrt(asked)])).argsort()[:100]
        found[name] = shares(sources, asked[best].mean(0))
    return found


def by_doremi(sources: Sources, seed: int) -> Shares:
    """DoReMi (Xie et al. 2023, arXiv 2305.10429), algorithm 1: it knows no target, and evens out what is left to learn.

    Its weights grow with the excess of the loss over that of a model trained on all alike, and are averaged over the steps.
    """
    reference, k = trained(sources, shares(sources, np.ones(len(sources))), seed), len(sources)
    alpha, mean = torch.full((k,), 1 / k), torch.zeros(k)

    def each(model: GPT, rows: Tensor, source: Tensor) -> Tensor:
        nonlocal alpha, mean
        found = losses(model, rows)
        with torch.no_grad():
            excess = (found - losses(reference, rows)).clamp(min=0)
            counts = torch.bincount(source, minlength=k).clamp(min=1)
            by_source = torch.bincount(source, excess, minlength=k) / counts
            alpha = alpha * (DRO_RATE * by_source * k).exp()
            alpha = (1 - DRO_SMOOTHING) * alpha / alpha.sum() + DRO_SMOOTHING / k
            mean += alpha / STEPS
        return (alpha[source] * k * found).mean()

    trained(sources, shares(sources, np.ones(k)), seed, each=each)
    return shares(sources, mean)


def learned(
    sources: Sources,
    targets: Sequence[Tensor],
    seed: int,
    *,
    sampled: bool = True,
    method: hoptim.Implicit = PRECONDITIONED,
    every: int = EVERY,
    join: Callable[[Tensor], Tensor] = torch.mean,
    steps: int = STEPS,
    rate: float | None = None,
    start: Shares | None = None,
) -> tuple[GPT, Shares, list[Shares]]:
    """A model that was trained while its mixture was learned, the mixture, and the mixture after each hyperstep.

    With ``sampled`` the training draws by what is learned, else from all sources alike, with weights in the loss. The losses
    on several targets are joined to a single one by ``join``.
    """
    model, inner = fresh(seed)
    hparams = DomainWeights(start or dict.fromkeys(sources, 1))
    rows = {name: Rows(text) for name, text in sources.items()}
    stream = hoptim.Mixture(rows, hparams.probabilities if sampled else None, seed=seed)
    evenly = hoptim.Mixture(rows, seed=seed + 1)
    unseen = hoptim.Mixture({str(n): Rows(text) for n, text in enumerate(targets)}, seed=seed)

    def criterion(z: Tensor, hparams: Any, batch: Any) -> Tensor:
        return hparams.mean(of_rows(z, batch[0]), *batch[1:])

    def val_loss(model: Any, _: Any, batch: Any) -> Tensor:
        rows, target, _ = batch
        found = losses(model, rows)
        return join(torch.stack([found[target == n].mean() for n in range(len(targets))]))

    loss = hoptim.CompositeLoss(lambda model, _, batch: model(batch[0][:, :-1]), criterion)
    outer = hparams.optimizer(rate)
    optimizer = hoptim.BilevelOptimizer(
        inner,
        outer,
        hoptim.Problem(model, hparams, loss, val_loss),
        val_batches=DataLoader(unseen, batch_size=HYPER_BATCH),
        train_batches=DataLoader(evenly, batch_size=HYPER_BATCH),
        hypergradient=method,
        warmup=WARMUP,
        every=every,
        hooks=[lambda _: stream.update(hparams["mixture"])] if sampled else [],
    )
    rates, falling = schedule(optimizer, steps), outer.param_groups[0]["lr"]
    path = [hparams.probabilities]
    for step, batch in zip(range(steps), DataLoader(stream, batch_size=BATCH), strict=False):
        before = optimizer.record
        optimizer.zero_grad()
        optimizer.loss(batch).backward()
        optimizer.step()
        rates.step()
        outer.param_groups[0]["lr"] = falling * (1 - step / steps)
        if optimizer.record is not before:
            path.append(hparams.probabilities)
    return model, path[-1], path


def smooth_maximum(losses: Tensor, width: float = 0.05) -> Tensor:
    """The loss on the worst target, or nearly: width · log mean exp(L/width)."""
    return width * (torch.logsumexp(losses / width, 0) - math.log(len(losses)))


def learned_for_each(sources: Sources, targets: dict[str, Tensor], seed: int) -> dict[str, Shares]:
    """A mixture for each target from one training on their mean, in which each hyperstep solves once for all targets."""
    model, inner = fresh(seed)
    each = nn.ModuleDict({name: DomainWeights(dict.fromkeys(sources, 1)) for name in targets})
    rows = {name: Rows(text) for name, text in sources.items()}
    stream, evenly = hoptim.Mixture(rows, seed=seed), hoptim.Mixture(rows, seed=seed + 1)
    unseen = hoptim.Mixture({name: Rows(text) for name, text in targets.items()}, seed=seed)

    def criterion(z: Tensor, hparams: Any, batch: Any) -> Tensor:
        return torch.stack([one.mean(of_rows(z, batch[0]), *batch[1:]) for one in hparams.values()]).mean()

    def val_losses(model: Any, _: Any, batch: Any) -> Tensor:
        found = losses(model, batch[0])
        return torch.stack([found[batch[1] == n].mean() for n in range(len(targets))])

    loss = hoptim.CompositeLoss(lambda model, _, batch: model(batch[0][:, :-1]), criterion)
    problem = hoptim.Problem(model, each, loss, val_losses)
    outer, rates = hoptim.outer_adam(each), schedule(inner, STEPS)
    falling = outer.param_groups[0]["lr"]
    val_batches = iter(DataLoader(unseen, batch_size=HYPER_BATCH))
    train_batches = iter(DataLoader(evenly, batch_size=HYPER_BATCH))
    for step, batch in zip(range(1, STEPS + 1), DataLoader(stream, batch_size=BATCH), strict=False):
        inner.zero_grad()
        losses(model, batch[0]).mean().backward()
        inner.step()
        rates.step()
        if step >= WARMUP and step % EVERY == 0:
            found = hoptim.hypergradient(problem, next(train_batches), next(val_batches), PRECONDITIONED, inner=inner)
            own = {f"{name}.mixture": found.grads[f"{name}.mixture"][n] for n, name in enumerate(targets)}
            outer.param_groups[0]["lr"] = falling * (1 - step / STEPS)
            hoptim.outer_step(problem, outer, own)
            stream.update(torch.stack([one["mixture"] for one in each.values()]).mean(0))
    return {name: one.probabilities for name, one in each.items()}
