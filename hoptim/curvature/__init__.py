"""Curvatures: the matrix A = ∂F/∂w at a point, and B = ∂F/∂λ.

For `condition=Gradient()`, F = ∇_w L_T and A is the Hessian of the training loss, or a matrix that is used in its place.
A is never formed: the graph of F is built once for each hypergradient, and a product with A or Bᵀ is one backward pass
through it. A curvature is passed to `hoptim.Implicit`.

| curvature | the matrix | cost of a product, in training gradients |
|---|---|---|
| `Exact()` | the Hessian ∂²L_T/∂w² | 0.9 to 1.9, through one cached graph |
| `GaussNewton()` | Jᵀ(∂²criterion/∂z²)J + ∂²penalty/∂w², with z the model's output and J = ∂z/∂w | about the same |
| `FiniteDifference()` | central differences of gradients | 2, and 2 or more to choose the step |
| `Averaged(batches=n, curvature=...)` | the mean over n training batches | n times that of the curvature |
| `Sampled(curvature=...)` | a new training batch for each product (stocBiO) | that of the curvature, and a graph |

# Exact or Gauss-Newton

The Hessian of a real network nearly always has negative eigenvalues. Gauss-Newton leaves out the curvature of the model
itself, so it is positive semidefinite if the criterion is convex in the model's output, as cross-entropy is, and positive
definite if a penalty is too. In the fidelity study (see `hoptim.solvers`) it is closer to the truth with almost every
solver, most of all on the worst problem. It has to know the parts of the loss, so write the training loss as a
`CompositeLoss`. `Implicit()` then uses Gauss-Newton by itself, and the exact Hessian otherwise.

>>> import torch
>>> from torch import nn
>>> from hoptim import CompositeLoss, Exact, GaussNewton, HyperParameters, Implicit, Problem, hypergradient
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
>>> hparams = HyperParameters({"decay": torch.tensor(0.1)})
>>> train_loss = CompositeLoss(
...     predict=lambda model, hparams, batch: model(batch[0]),
...     criterion=lambda z, hparams, batch: (z[:, 0] - batch[1]).square().mean(),
...     penalty=lambda model, hparams: hparams["decay"] * sum(p.square().sum() for p in model.parameters()),
... )
>>> val_loss = lambda model, hparams, batch: (model(batch[0])[:, 0] - batch[1]).square().mean()
>>> problem = Problem(model, hparams, train_loss, val_loss)
>>> train, val = [(torch.randn(8, 3), torch.randn(8)) for _ in range(2)]
>>> for curvature in (Exact(), GaussNewton()):
...     print(hypergradient(problem, train, val, Implicit(curvature=curvature)).solution.status.ok)
True
True

Gauss-Newton needs a criterion with curvature in z. A criterion that is linear in z, as `nll_loss` is in log-probabilities,
is an error: let `predict` return the logits instead of `log_softmax` and take `cross_entropy`, or take
`Implicit(curvature=Exact())`. L1 and hinge losses are piecewise linear: take `Exact()`.

# Damping

`Implicit(damping=δ)` solves with A + δI. It bounds the answer where A is nearly singular or slightly negative, at the
price of a bias. The default, five terms of MINRES, needs none.

# Noisy batches

On small batches the curvature is noisy. `Averaged(batches=4)` takes the mean over several batches: the hyperstep's own and
others from `train_batches`. On batches of 16 it raises the default's cosine to the truth from 0.52 to 0.64, at about three
times the cost. With `Sampled()` each product takes another batch. The default solver is then `Neumann`; Krylov solvers need
the same A in each product and refuse it.

# Models without second derivatives

Some operations have no second derivative in torch: `once_differentiable` functions, EmbeddingBag, hardsigmoid, fused
kernels. The error names the operation, and `Implicit(curvature=FiniteDifference())` works instead. It evaluates all
gradients with the same random state, so that dropout masks agree. It chooses its step by comparing two at the first product
of each hypergradient, and warns if none agree: in float32 a net of ReLUs may have too many kinks. Later products use the
same step unchecked, but for Bᵀx, which is the answer. It cannot see an autocast *inside* a loss: use
`FiniteDifference(step=0.1)` there.

# Compiled products

`Exact(compile=True)` and `GaussNewton(compile=True)` trace the training loss once, split it into a part that is run once
for each hypergradient and a part that is run for each product, and compile both. With 20 terms of Neumann this takes 0.63
to 0.92 of the eager time for `Exact`, 0.57 to 0.88 for `GaussNewton` (`python scripts/benchmark.py --only compiled`).
Compilation takes 6 to 29 s, once for each run and each shape of batch; when only values change, nothing is compiled
again. A loss that cannot be traced is not compiled, with a warning that says why. A Python value that the loss reads is
built into the compiled code. If it changes, the products no longer agree with plain PyTorch, which is checked regularly,
and they are compiled again.

# Several right-hand sides

If the validation loss returns R losses, their solves share each product. The R vectors go through the graph at once, or one
by one with more than 2²⁰ weights or with convolutions, where that is faster.

A curvature of your own: see `hoptim`.
"""
