"""Solvers of Aᵀx = g, and how to choose one.

An implicit hypergradient needs x with Aᵀx = g, where A is the curvature of the training loss and g = ∂L_V/∂w (see
`hoptim.methods`). A has a row for every weight of the model, so a solver never forms it. It only multiplies by it, a few
times; each product costs about one to two training gradients. A solver is passed to `hoptim.Implicit`:

>>> from hoptim import CG, Implicit
>>> method = Implicit(CG(terms=20))                      # BilevelOptimizer(..., hypergradient=method)

# The solvers

| solver | what it computes | products with A | use it for |
|---|---|---|---|
| `MINRES(terms=5)` | least residual of a Krylov space | 5 | the default: a curvature of either sign |
| `CG(terms=20)` | conjugate gradients | up to 20 | positive definite curvatures: strongly convex, damped or Gauss-Newton |
| `GMRES(terms=5)` | least residual, unsymmetric A | 5 | `condition=Update()` |
| `Neumann(terms=20)` | α Σ (I − αAᵀ)ʲ g | 20, and 2 for the step size | comparison with published results |
| `Chebyshev(terms=20)` | best polynomial on an interval | 20, and 2 for the interval | many terms: no inner products |
| `Nystrom(rank=10)` | (A_k + ρI)⁻¹ g with A_k of rank k | rank + 1, in one batch | a curvature with few large eigenvalues |
| `Identity()` | g | 0 | the cheapest: T1–T2, or SAMA with `SecondMoments` |
| `WarmStart(solver)` | starts at the last solution | those of the solver, and 1 | frequent hypersteps |
| `SOBA(step_size)` | one step towards the solution | 1 | single-loop training |

`terms` is the largest number of products. A chosen step size or interval takes 10 the first time. A solve that stops
earlier, at its `tolerance`, spends one more on the true residual, and only then is its status `CONVERGED`. A tolerance
of 0 stops at ten rounding errors. With a
preconditioner the solver sees D^(−1/2) A D^(−1/2).

`WarmStart` begins at zero after a solve that met negative curvature: there the early stop is the regulariser, and many
solves in a row would undo it. So it is for `GaussNewton()`, or an exact Hessian with damping.

`SOBA` is Dagréou et al.'s single loop: with `every=None`, call `hyperstep()` between `backward()` and `step()`.

# Which one

- **Leave it open.** `Implicit()` takes five terms of `MINRES`, on Gauss-Newton if the training loss is a `CompositeLoss`,
  else on the exact Hessian. It costs half of twenty Neumann terms and is closer to the truth. It needs no step size and
  no damping, has no trouble with negative curvature, and its answers have a reasonable length. Length matters: in
  learning weights for 600 digits, 40 % of them with wrong labels, it ends at a test loss of 0.244 (0.250 on the exact
  Hessian, 0.268 with Neumann, 0.745 with nothing learned). `CG` on the exact Hessian has better cosines, but ends at
  0.408, because single answers are 85 times as long as the median (`python scripts/fidelity.py --learning`).
- **Nothing did better by more than noise** on the twelve learning tasks of
  [the study of defaults](scripts/README.md#the-study-of-defaults): other terms of MINRES, Neumann, CG with and without
  damping, or a stop by residual or by the noise of the validation gradient.
- **Take few terms.** The Hessian of nearly every real network has negative eigenvalues. The exact solution then belongs
  to a saddle point, and more terms turn the answer away from the truth: 50 terms of MINRES are worse than 5. Stopping
  early is the regularization.
- **Strongly convex or damped problems**: `CG(terms=20)`. On the paper's own example, Boston housing with 14 log decays
  ([picture](scripts/fidelity_boston.png)), 20 terms are exact, where 20 terms of Neumann have a cosine of 0.93.
- **Small batches**: average the curvature, `Implicit(curvature=Averaged(batches=4))`; see `hoptim.curvature`.
- **Learning rate, momentum, or the optimizer's own weight decay**: `Unrolled`; on a trained model also
  `Implicit(condition=Update())` with GMRES. See `hoptim.methods`.

# How close they come to the truth

The fidelity study compares each method with the true hypergradient on eleven problems: a closed form, or differentiation
through the whole training. The table shows the cosine, the median over 3 to 8 seeds: its mean over the problems, and its
value on the worst problem.

![Cosine to the true hypergradient against cost, eleven problems](scripts/fidelity.png)

| mean / worst problem | exact Hessian | Gauss-Newton | products |
|---|---|---|---|
| Identity | 0.44 / 0.23 | | 0 |
| the blog's: Neumann, 5 terms, step 0.1 | 0.54 / 0.33 | | 5 |
| Neumann, 20 terms | 0.74 / 0.34 | 0.76 / 0.47 | 22 |
| **MINRES, 5 terms** (the default) | 0.77 / 0.29 | **0.78 / 0.46** | 5 |
| MINRES, 10 terms | 0.78 / 0.20 | 0.80 / 0.46 | 10 |
| MINRES, 50 terms | 0.65 / 0.17 | | 50 |
| CG, 7 terms | 0.81 / 0.42, up to 52 times too long | 0.80 / 0.46 | 7 |
| CG to a residual of 0.03, damping 0.01 | 0.78 / 0.42 | 0.83 / 0.47 | 10; 12 |
| Chebyshev, 20 terms | 0.79 / 0: it fails on small batches | 0.82 / 0.48 | 22 |
| Unrolled, 50 steps | 0.79, for about 240 gradients | | |

`python scripts/fidelity.py` computes it again and compares it with [the stored figures](scripts/fidelity.json).

# What a solver returns

A `Solution`: the answer x in `value`, a `Status`, the relative residuals ‖g − Aᵀx‖ / ‖g‖ after each term, and the number
of products. Why a solve stopped and how good its answer is are two things. The status says the first: `FINISHED` means that
all terms were used, `FLAT_DIRECTIONS` that the rest of g lies where the curvature is zero within rounding, `CONVERGED` that
the tolerance is met. The last residual says the second: 0 is exact, and above 1 zero would be the better answer, with the
status `LARGE_RESIDUAL`. `detail` has both in words, "5 of 5 terms, residual 0.24".

The residuals are those that the solver tracks; Neumann's last is that of one term before the end. The last one is the true
one, computed by one more product, if the solve converged, and if MINRES sees that rounding may have taken it elsewhere, as
in a long solve of an ill-conditioned system in float32; if they differ, the status is `INEXACT`.

>>> import torch
>>> from torch import nn
>>> from hoptim import MINRES, Exact, HyperParameters, Problem, hypergradient
>>> _ = torch.manual_seed(0)
>>> model, hparams = nn.Linear(3, 1), HyperParameters({"decay": torch.tensor(0.1)})
>>> def train_loss(model, hparams, batch):
...     return (model(batch) - 1).square().mean() + hparams["decay"] * model.weight.square().sum()
>>> problem = Problem(model, hparams, train_loss, lambda model, hparams, batch: model(batch).square().mean())
>>> train, val = torch.randn(8, 3), torch.randn(8, 3)
>>> solution = hypergradient(problem, train, val, Implicit(MINRES(terms=5), curvature=Exact())).solution
>>> solution.status.name, solution.products                                       # 4 weights, so 4 terms are enough
('CONVERGED', 5)
>>> bool(solution.residuals[0] > solution.residuals[1] > solution.residuals[2] > 1e-3), bool(solution.residuals[-1] < 1e-5)
(True, True)

The README has a table of all statuses. `hoptim` shows how to write a solver of your own.
"""
