"""The audit: is this hypergradient right, on this model?

A residual says how well a system was solved, not whether the answer is right: training may not have converged, the
curvature may be negative, the validation batch may be too small. `hoptim.audit` measures all of these at the present
weights, and does not change the model.

>>> import torch
>>> from torch import nn
>>> from hoptim import HyperParameters, Problem, audit
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(400, 3)
>>> y = x.sum(1, keepdim=True) + 0.1 * torch.randn(400, 1)
>>> train, val = (x[:200], y[:200]), (x[200:], y[200:])
>>> model, hparams = nn.Linear(3, 1), HyperParameters({"decay": torch.ones(3)})
>>> def val_loss(model, hparams, batch):
...     return (model(batch[0]) - batch[1]).square().mean()
>>> def train_loss(model, hparams, batch):
...     return val_loss(model, hparams, batch) + (hparams["decay"] * model.weight.square()).sum()
>>> problem = Problem(model, hparams, train_loss, val_loss)
>>> inner = torch.optim.SGD(model.parameters(), lr=0.1)
>>> for _ in range(200):
...     inner.zero_grad()
...     problem.loss(train).backward()
...     inner.step()
>>> found = audit(problem, train, val, inner=inner, steps=50)
>>> found.status.name, [one.verdict for one in found.directions], found.advice
('CONVERGED', ['agrees', 'agrees', 'agrees'], ())

`print(found)` shows everything that was measured:

- how far the weights are from a stationary point, ‖∇L_T‖ with the optimizer's own decay, and the ends of the curvature's
  spectrum;
- the cosine to the hypergradients of a much longer solve and of unrolled steps;
- the slope of the validation loss along the hypergradient and along random directions, by finite differences of *real
  retraining* with `inner`: with everything that forward passes write, and with any optimizer, since one that torch can't
  differentiate, such as LBFGS, trains a copy of the model; for `Replay(batches)` on its own batches, with its own options;
- the standard error of the hypergradient over parts of the validation batch;
- if the curvature is positive definite, a bound on the error of the solve.

`found.advice` says what to change, `found.to_dict()` and `found.plot("audit.png")` keep the figures. Retraining takes
most of the time: about 4·`steps`·(`directions` + 1) training gradients. An audit is for one process.

The cheap part is in every `Record`: the residual, the status, ‖∇L_T‖ (`train_gradient_norm`), and the cosine to the
hypergradient before. A cosine near 0 over many hypersteps means that noise dominates: use larger validation batches or a
smaller outer rate.
"""
