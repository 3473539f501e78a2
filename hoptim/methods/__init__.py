"""Methods for the hypergradient dL_V/dλ: implicit differentiation, and differentiation through unrolled steps.

L_T(w, λ) is the training loss, L_V(λ, w) the validation loss, w the weights and λ the hyperparameters. After training
F(w, λ) = 0, where F says what "trained" means. The implicit function theorem then gives

    dL_V/dλ = ∂L_V/∂λ − Bᵀx,    Aᵀx = g,    with A = ∂F/∂w, B = ∂F/∂λ, g = ∂L_V/∂w.

`Implicit` computes this, and each part of it is a choice: the condition F, the curvature A (`hoptim.curvature`), the
solver (`hoptim.solvers`), a preconditioner and damping. `Unrolled` solves no system and differentiates through the last
inner steps.

# Implicit or unrolled

| | `Implicit(...)` | `Unrolled(steps)` |
|---|---|---|
| assumes | a nearly stationary point of training | nothing |
| cost | a few products: about 10 gradients with the default | 4 to 5 gradients for each step |
| memory | a few gradients | weights and state for each step; with `checkpoint=True` for √steps |
| sees | what changes ∇L_T; options of the inner optimizer only with `Update()` | everything that changes the steps |
| optimizers | any | those that torch can differentiate |

`Unrolled` goes back over the steps since the last hyperstep. `BilevelOptimizer` keeps a copy of weights and state from
before each of them, and repeats the step from there with the same batch, dropout mask and options. If there are no such
steps, as with `hyperstep()` under `every=None` or in a single call of `hypergradient`, it differentiates through the steps
that would come next. Unrolled steps with a `GradScaler` are not supported, and the derivative of gradient clipping is not
included: the status says so.

# In a loop of your own

Without `BilevelOptimizer`, compute one hypergradient at a time. It changes nothing in the model:

>>> import torch
>>> from torch import nn
>>> from hoptim import Problem, hypergradient, outer_step
>>> from hoptim.recipes import WeightDecay
>>> _ = torch.manual_seed(0)
>>> model, x, y = nn.Linear(3, 1), torch.randn(16, 3), torch.randn(16, 1)
>>> def val_loss(model, hparams, batch):
...     return (model(x[batch]) - y[batch]).square().mean()
>>> def train_loss(model, hparams, batch):
...     return val_loss(model, hparams, batch) + hparams.penalty(model)
>>> hparams, train, val = WeightDecay(model), torch.arange(8), torch.arange(8, 16)
>>> problem, outer = Problem(model, hparams, train_loss, val_loss), hparams.optimizer()
>>> inner = torch.optim.SGD(model.parameters(), lr=0.1)
>>> problem.loss(train).backward()          # the training loss: gradients for the weights, none for the hyperparameters
>>> inner.step()
>>> result = hypergradient(problem, train, val, inner=inner)
>>> result.solution.status.name, result.grads["decay.weight"].shape
('CONVERGED', torch.Size([]))
>>> outer_step(problem, outer, result.grads)    # moves the hyperparameters, and keeps their constraints

# Conditions: what "trained" means

- `Gradient()`, the default: F = ∇_w L_T + c ⊙ w, where c is the inner optimizer's own weight decay, so A is the Hessian
  plus diag(c). Hyperparameters that act only through the inner optimizer, such as its learning rate, do not change F. That
  is an error, which says what to use instead. Only a learned `weight_decay` does.
- `Update()`: F = u, where the inner optimizer's step is w ← w − u, with its state held fixed. This sees the learning rate,
  momentum and the optimizer's own weight decay. A is not symmetric, so the default solver is `GMRES(terms=5)`. With a
  first moment and a decoupled decay, as in AdamW, the decay counts too much: 41 % off in a regression with β₁ = 0.5, where
  `Gradient()` was right to 0.2 %; a warning says so.

*The optimizer's own weight decay* is a part of where training ends, so it has to be in F. A `BilevelOptimizer` knows it; to
`hypergradient` and `audit` give `inner=optimizer`. For the coupled decay of SGD, Adam and others c is `weight_decay`, for
each parameter group its own. For the decoupled decay of AdamW, and of NAdam and RAdam with `decoupled_weight_decay=True`,
the step is ∇L_T / (√v̂ + ε) + `weight_decay`·w, so that c = `weight_decay`·(√v̂ + ε) with the second moments as they are; the
default, 0.01 in AdamW, counts as well. In [a regression](tests/methods/test_own_decay.py) under SGD with `weight_decay=2`
the slope is −0.0890, as by retraining, and −0.254 without the decay. Of optimizers that hoptim does not know, and of
Adafactor and Muon, a warning says that it is left out.

A decay also makes A positive where the training loss is flat, as with more weights than examples: there the solution is
found, while without it the curvature is singular, however long the training. So if a solve meets `NO_CURVATURE` or
`LARGE_RESIDUAL`, a small decay in the inner optimizer is a remedy.

# A learned learning rate

Use `Unrolled`, the default if an option of the inner optimizer is learned: over 20 steps, or over `every` if that is less.
`Update()` is for trained models. On an untrained one it applies the implicit function theorem at a point that is not the
end of training, and the hypergradient of a learning rate can have the wrong sign. On digits with Adam at 1e-4, far too low,
`Update()` gave +901 and took the rate to 0, where nothing is learned. `Unrolled(20)` gave −157; on a log scale it took the
rate to 2e-3, and the test loss after 600 steps was 0.23 instead of 1.58. If `Update()` meets negative curvature, a warning
says so.

Name the options in `BilevelOptimizer(..., options={"lr": "rate"})`: here the hyperparameter `"rate"` is the learning rate of
every parameter group. With `positive` it is learned on a log scale; `unit_interval` is for momentum and betas. For a pair,
name one or both: `{"betas": ("one", None)}`. A list has a name for each parameter group, or `None` to leave it as it is:
`{"lr": ["rate", None]}`. The inner optimizer may also be built with `lr=hparams["rate"]`. If its own number is that from
which the hyperparameter starts, as in `SGD(..., lr=2.5e-4)` with `torch.tensor(2.5e-4)`, training starts with the same bits.

>>> import torch
>>> from torch import nn
>>> from torch.distributions import constraints
>>> from hoptim import BilevelOptimizer, HyperParameters, Implicit, Problem, hypergradient
>>> _ = torch.manual_seed(0)
>>> model, x, y = nn.Linear(3, 1), torch.randn(16, 3), torch.randn(16, 1)
>>> loss = lambda model, hparams, batch: (model(x[batch]) - y[batch]).square().mean()
>>> hparams = HyperParameters({"rate": torch.tensor(0.01)}, {"rate": constraints.positive})
>>> problem = Problem(model, hparams, loss, loss)
>>> inner = torch.optim.SGD(model.parameters())
>>> outer = torch.optim.Adam(hparams.parameters(), lr=0.1)
>>> train, val = torch.arange(8), torch.arange(8, 16)
>>> optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[val], options={"lr": "rate"}, every=5)
>>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
>>> for _ in range(20):
...     optimizer.zero_grad()
...     optimizer.loss(train).backward()
...     optimizer.step()
...     scheduler.step()
>>> optimizer.hypergradient, bool(hparams["rate"] > 0.01)                          # a larger rate would have been better
(Unrolled(steps=5, checkpoint=False), True)

*With a schedule.* In place of the option the optimizer holds an ordinary number, at first the value of `hparams["rate"]`.
Schedulers may change it, and so may your loop, `group["lr"] = ...`. Each step uses this number times `hparams["rate"]` over
its first value: the schedule sets the shape, hoptim learns the size. Without a schedule the rate is exactly
`hparams["rate"]`, or this up to rounding where the number is the script's own. Build the scheduler on the
`BilevelOptimizer`: one that was built before `options` has numbers of its own, and is refused. A schedule of a learned
momentum, such as that of `OneCycleLR`, may leave the unit interval this way: give it `cycle_momentum=False`. The leaf is
read in each step, so keep it on the CPU. Give `hypergradient` and `audit` `inner=optimizer`. In a loop of your own, write
`group["lr"] = hparams["rate"]` after each move.

The option may also be a leaf itself, without constraint or `nonnegative`: `lr=hparams.lr`, with `foreach=False` for Adam.
Then nothing may overwrite it, not even a scheduler.

`Update` and `Unrolled` work with the optimizers of `torch.optim` that have `differentiable=True`: SGD, Adam, AdamW,
NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, Rprop, ASGD. With gradient accumulation, `Update` assumes the step of the
mean loss, so divide each loss by their number.

# Preconditioners

A preconditioner is a diagonal matrix D near A. The solver then works on D^(−1/2) A D^(−1/2), whose eigenvalues lie closer
together, and its residuals are measured in that scale. `Jacobi()` estimates A's own diagonal from a few products.
`SecondMoments()` uses the second moments of an inner Adam, and costs nothing; with `Identity()` it is SAMA's hypergradient.

# One hypergradient, for any loop

`hypergradient` needs no `BilevelOptimizer` and changes nothing in the model.

>>> decay = HyperParameters({"decay": torch.tensor(0.1)}, {"decay": constraints.positive})
>>> def train_loss(model, hparams, batch):
...     return loss(model, hparams, batch) + hparams["decay"] * model.weight.square().sum()
>>> problem = Problem(model, decay, train_loss, loss)
>>> for _ in range(100):                                                             # a training loop of your own
...     weights = list(model.parameters())
...     gradient = torch.autograd.grad(problem.loss(train), weights)                 # the training loss, decay held fixed
...     with torch.no_grad():
...         _ = [p.sub_(0.1 * step) for p, step in zip(weights, gradient)]
>>> result = hypergradient(problem, train, val, Implicit())
>>> result.solution.status.ok, result.grads["decay"].shape, bool(result.direct["decay"] == 0)
(True, torch.Size([]), True)

`result.grads` are derivatives with respect to the leaves, `hparams.named_parameters()`: with `positive`, with respect to
log λ.

# Limits

- The formula is exact at a stationary point of the training loss and for an exact solve. A few terms on a model that is
  still training are neither. Look at `residuals` and at `train_gradient_norm` in the record, and judge by a separate test
  set.
- Early in training the sign may be wrong, and no status says so. On two small PINNs (Poisson, Burgers) with a learned
  weight of the boundary loss, after 15 to 40 steps of LBFGS, the default had the wrong sign in 40 of the 71 cases in which
  differences of retraining, over the same number of steps, could be measured; in 14 of them it met no negative curvature
  and the status was `FINISHED`. More terms do not help, since it is the training that has not ended: 20 terms were wrong
  in 39 cases, a dense solve in 42. The answer of one term less does not tell right from wrong: it had another sign in 7 of
  the 40 wrong cases and in 2 of the 31 right ones. Let the training go on first, with a longer `warmup`, or take `Unrolled`
  with an optimizer that torch can differentiate.
- *What a forward pass writes.* `Unrolled` and `Replay` carry buffers and plain attributes from step to step, as the training
  does: counters, states of a stateful RNN, codebooks, and running statistics, whose derivative they have for torch's batch
  and instance norms ([tests](tests/methods/test_writing_models.py)). What a model writes under `no_grad()` or detached, as
  `spectral_norm`, an `Embedding` with a `max_norm` or a running scale of your own, has no derivative for autograd. If it
  depends on the weights and later losses read it, the status is `UNSEEN_WRITES`; so it is if a training loss reads running
  statistics that it has just written, in `eval()` after `train()`, or writes them twice by activation checkpointing. This is
  tried on three steps, so what is written on few others may be missed, as what objects in attributes hold. A buffer that the
  first forward pass makes is refused. `Implicit` takes the present buffers as fixed. With `DistributedDataParallel`, which
  copies the first rank's buffers to all, each rank keeps its own.
- A hyperstep's dropout masks are those of the next training step, because it restores the state of the random generators.
- Several right-hand sides share each product up to 2²⁰ weights. With more weights or with convolutions they go one by one,
  which is faster there.

Properties that are tested on random small models: the hypergradient is linear in the validation loss, does not depend on
names or on the order of hidden units, is the same for several right-hand sides at once and one by one, and equals the
dense answer ([tests](tests/methods/test_properties.py)).

# A whole training, and a learned schedule

`Replay(batches)` differentiates through all steps of a training on these batches, from the present weights on. It is exact,
so it also sees what acts early, far from any stationary point: a warm-up, a schedule, the order of the data. The model does
not move, so hyperparameters can be learned over many trainings from one start, before the final training. Here the learning
rate of SGD is piecewise linear, with values at the beginning, the middle and the end:

>>> from hoptim import Replay, outer_step
>>> steps, curve = 20, HyperParameters({"rate": torch.full((3,), 0.01)}, {"rate": constraints.positive})
>>> def rate(hparams, t):
...     place = 2 * t / (steps - 1)
...     left = min(int(place), 1)
...     return torch.lerp(hparams["rate"][left], hparams["rate"][left + 1], place - left)
>>> method = Replay([train] * steps, options=lambda hparams, t: {"lr": rate(hparams, t)})
>>> model = nn.Linear(3, 1)
>>> inner, problem = torch.optim.SGD(model.parameters(), lr=1.0), Problem(model, curve, loss, loss)
>>> outer = torch.optim.Adam(curve.parameters(), lr=0.3)
>>> losses = []
>>> for _ in range(5):                                                             # five trainings, none of which is kept
...     result = hypergradient(problem, None, val, method, inner=inner)
...     outer_step(problem, outer, result.grads)
...     losses.append(result.val_loss.item())
>>> losses == sorted(losses, reverse=True)
True
>>> scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda t: rate(curve, t).item())     # for the training itself

With T steps and k = `segments` about k·log_k T copies of weights and optimizer state are held, and a step is taken log_k T
times without a graph and once with it: 1,000 steps in 8 segments hold at most 32 copies, and take each step five times, at
most four of them without a graph.
"""
