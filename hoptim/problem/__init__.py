"""Models and losses: how to write them, and what they may contain.

A `Problem` holds a model, hyperparameters and two losses. A loss is ordinary PyTorch, `loss(model, hparams, batch) ->
scalar`:

>>> import torch
>>> from torch import nn
>>> from torch.distributions import constraints
>>> from hoptim import HyperParameters, Problem, hypergradient
>>> def train_loss(model, hparams, batch):
...     x, y = batch
...     penalty = sum((hparams[name] * p.square()).sum() for name, p in model.named_parameters())
...     return nn.functional.cross_entropy(model(x), y) + 0.5 * penalty
>>> def val_loss(model, hparams, batch):
...     x, y = batch
...     return nn.functional.cross_entropy(model.eval()(x), y)
>>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
>>> decays = {name: torch.full_like(p, 1e-3) for name, p in model.named_parameters()}
>>> hparams = HyperParameters(decays, dict.fromkeys(decays, constraints.positive))
>>> problem = Problem(model, hparams, train_loss, val_loss)

A decay for each tensor, channel or weight, without biases and norms, is one line with `hoptim.recipes.WeightDecay`.

`problem.loss(batch)` is the training loss on the live model, for `backward()`: the weights get gradients, the
hyperparameters none. Inside `BilevelOptimizer`, call `optimizer.loss(batch)` instead, which also notes the batch for the
next hyperstep.

>>> batch = torch.randn(6, 4), torch.arange(6) % 3
>>> problem.loss(batch).backward()
>>> all(p.grad is not None for p in model.parameters()), all(leaf.grad is None for leaf in hparams.parameters())
(True, True)

With `has_aux=True` the training loss returns a pair, as in `torch.func`, and the loop gets both: the loss, and for example
an accuracy for the log or the hidden state of an RNN. Only the loss is differentiated.

>>> def with_accuracy(model, hparams, batch):
...     x, y = batch
...     logits = model(x)
...     return nn.functional.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean().item()
>>> loss, accuracy = Problem(model, hparams, with_accuracy, val_loss, has_aux=True).loss(batch)
>>> loss.requires_grad, 0 <= accuracy <= 1
(True, True)

Use the model and the hyperparameters that the loss is given, not others: during a hypergradient other tensors are in their
place. A loss may switch the mode with `model.eval()`: it is restored after each call. If `val_loss` runs dropout or batch
norm in training mode, there is one warning; if you want random masks there, silence it with
`warnings.filterwarnings("ignore", "val_loss runs .* in training mode")`. A loss that writes into weights or
hyperparameters, or uses another model than the one that it is given, is an error.

# Hyperparameters

`HyperParameters(values, constraints)` holds named tensors of any shape. `hparams["name"]` is the natural value. The outer
optimizer moves the leaves, `hparams.parameters()`, which are unconstrained:

| constraint | value from leaf θ | use it for |
|---|---|---|
| `real` (default) | θ | options without a bound |
| `positive` | exp θ | decays, scales: steps are relative |
| `unit_interval` | 1 / (1 + exp(−θ)) | example weights, probabilities |
| `nonnegative` | θ, set to 0 if an outer step makes it negative | decays that may vanish, learned options of the inner optimizer |

All other `torch.distributions.constraints` with a bijection work too. Names may contain dots, so that a decay can have the
name of its weight. A start on an edge, or so near to one that its leaf does not give it back, is refused. A state knows its
constraints, and is refused under others. Any other `nn.Module` works in place of `HyperParameters`: a network that computes
weights, a learned augmentation, learned images.

# Several validation losses

If `val_loss` returns a vector of R losses (tasks, groups, folds), each gets its own hypergradient from one batched solve.
`val_weights` of `BilevelOptimizer` weights them, by default equally, and the record has the standard error of their mean.

>>> def two(model, hparams, batch):
...     x, y = batch
...     return nn.functional.cross_entropy(model.eval()(x), y, reduction="none").reshape(2, -1).mean(1)
>>> result = hypergradient(Problem(model, hparams, train_loss, two), batch, batch)
>>> result.val_loss.shape, result.grads["0.bias"].shape
(torch.Size([2]), torch.Size([2, 8]))

# Which models work

Each row is tested against plain autograd on a copy, or against dense linear algebra in float64.

| models | | tests |
|---|---|---|
| dropout, every norm, RNNs, attention, Transformers, tied, frozen, LoRA-parametrized and partly frozen weights, weight and spectral norm, both kinds of activation checkpointing, in-place operations, integer and complex buffers | as with plain autograd; buffers, attributes, masks and backend flags are left as they were; fused attention is replaced by the unfused one inside | [models](tests/problem/test_models.py), [kinds](tests/problem/test_model_kinds.py) |
| a Hugging Face model from a local folder; outputs that are dicts or dataclasses | as any other | [kinds](tests/problem/test_model_kinds.py) |
| weights in bf16, fp16, float64, or mixed | vectors in the solver have float32 or more | [kinds](tests/problem/test_model_kinds.py) |
| `torch.compile`, in either form | trains compiled; differentiated uncompiled; names without `_orig_mod.` | [kinds](tests/problem/test_model_kinds.py) |
| sparse embeddings | dense inside a hyperstep, sparse in your step | [models](tests/problem/test_models.py) |
| no second derivative (`once_differentiable`, EmbeddingBag, hardsigmoid, a fused kernel) | an error that names it; `FiniteDifference()` works. A custom backward that only *looks* differentiable is checked once by differences, with a warning | [kinds](tests/problem/test_model_kinds.py) |
| complex, lazy or meta weights | an error with the remedy | [kinds](tests/problem/test_model_kinds.py) |
| a loss that writes into the model, or uses another model than the given one | an error when the loss is first checked; what it wrote into learned tensors is restored | [bad input](tests/training/test_bad_input.py), [problem](tests/problem/test_problem.py) |

# Limits

- A hyperstep restores buffers and what attributes of a module hold: tensors, numbers, and lists and dicts of them, of up to
  1,000 items. What other objects hold, such as a cache of a class of your own, keeps what a forward pass writes into it.
- A loss that draws from Python's or NumPy's random generators, instead of torch's, gets other numbers in each evaluation of
  one hyperstep, so that `FiniteDifference` and `Unrolled` see noise. A hyperstep restores all three generators.
- Call `torch.compile(model)` first and give `Problem` what it returns; `model.compile()` may come later. If `torch.compile`
  wraps a model that `Problem` already has, there is a warning, but only if this happens before the first loss.
- `FiniteDifference` cannot see an autocast *inside* a loss: use `FiniteDifference(step=0.1)`.
- Weights that require a gradient but are not in the inner optimizer are assumed to be trained; a warning names them.
"""

# ruff: noqa: E501 (a row of a table has to be one line)
