"""The training loop: `BilevelOptimizer`, its settings, and everything it works with; `CrossValidated`; `retrain`.

`hoptim.BilevelOptimizer` is a `torch.optim.Optimizer`. It takes the steps of the inner optimizer, and every few steps it
moves the hyperparameters down the validation loss: a *hyperstep*.

>>> import torch
>>> from torch import nn
>>> from torch.distributions import constraints
>>> from hoptim import BilevelOptimizer, HyperParameters, Problem
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(80, 5)
>>> y = x[:, :1] + 0.5 * torch.randn(80, 1)
>>> def val_loss(model, hparams, batch):
...     return (model(x[batch]) - y[batch]).square().mean()
>>> def train_loss(model, hparams, batch):
...     return val_loss(model, hparams, batch) + (hparams["decay"] * model.weight.square()).sum()
>>> def build():
...     model = nn.Linear(5, 1)
...     hparams = HyperParameters({"decay": torch.full((1, 5), 0.1)}, {"decay": constraints.positive})
...     inner = torch.optim.SGD(model.parameters(), lr=0.1)
...     outer = torch.optim.Adam(hparams.parameters(), lr=0.05)
...     problem = Problem(model, hparams, train_loss, val_loss)
...     optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[torch.arange(40, 80)], every=10, warmup=50)
...     return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
>>> def train(optimizer, scheduler, steps):
...     for _ in range(steps):
...         optimizer.zero_grad()
...         optimizer.loss(torch.arange(40)).backward()           # was: criterion(model(x), y).backward()
...         optimizer.step()
...         scheduler.step()
>>> optimizer, scheduler = build()
>>> train(optimizer, scheduler, 200)
>>> optimizer.hyper_steps, optimizer.record.status.name, optimizer.record.moved
(16, 'FINISHED', True)
>>> decay = optimizer.record.hyperparameters["decay"][0]          # the first feature is the only useful one
>>> bool(decay[0] < decay[1:].min())
True

With `every=None` a run is bit for bit that of the inner optimizer alone, with the same options. (A tensor as the `lr` of
Adam, as for a learned rate, changes the last bits, with or without hoptim.)

# Warm-up, rate and schedule

- **`warmup`**: training steps before the first hyperstep, a quarter of all steps if nothing else is known. Hypergradients
  are right for trained weights, and on untrained ones point elsewhere: in an early study over folds nothing was gained
  without a warm-up. On the twelve tasks of [the study of defaults](scripts/README.md#the-study-of-defaults) it hardly
  mattered: without one the test loss was 0.2 ± 1.7 % lower at 12 % more time, with a half 1.4 ± 2.1 % higher. In trainings
  that start 30 times too low (scripts/arrive.py, seeds 0 and 1) nothing beat a quarter either: not 0, 0.1 or a half, nor to
  begin when the validation loss has stopped falling. While it falls fast, hypergradients ask for less decay.
- **The outer optimizer**: `hparams.optimizer()`, which is Adam on the leaves at the rates below. Adam moves a leaf by about
  its rate in a hyperstep. The study had about 40 hypersteps: for many more take a lower rate. Decays of `WeightDecay` share
  levels, whose rates fall by themselves (`hoptim.recipes`). A rate that is too large shows as a `cosine_to_last` around 0.
  This is over the entries that are zero in neither hypergradient, and `None` without any, as for example weights if two
  batches share no example. For a schedule of the outer rate, build the scheduler on `optimizer.outer`.

| constraint | the leaf | rate | test loss against that at 0.05, at rates of 0.01, 0.1, 0.3 |
|---|---|---|---|
| `positive` | log λ | 0.05, a step of 5 % | 2, 2, 13 % |
| `unit_interval`: example weights | log λ/(1 − λ) | 0.3 | 8, −17, −33 % |
| `real`: logits | λ | 0.1, for logits up to 0.3 | 43, −15, −29 % |
| `nonnegative`: decays, weights of losses | λ, clamped | 0.01 | −1, 12, 43 % |

- **`every`**: training steps between hypersteps, 100 by default. A hyperstep costs about 10 training gradients with the
  default method, so `every=100` adds about 10 %, and `every=10` doubles the cost.
- **`val_batches`**: validation batches, one for each hyperstep, over and over; or a function that draws one. Keep a test set
  apart: many hyperparameters can fit a small validation set.
- **`train_batches`**: the source of training batches for hypersteps; by default the batches of the last step.
- **Random numbers**: both may be a `DataLoader` that shuffles, with random transforms. Random numbers for a hyperstep, such
  as the order of batches and masks, come from separate streams, seeded by `torch.initial_seed()`. So a hyperstep does not
  change the generators of Python, NumPy and torch, nor that of the loader.
- **`on_failure`**: if a solve fails, nothing moves. `"skip"` warns, `"raise"` makes it an error.

By hand, `optimizer.hyperstep(train_batch, val_batch)` moves the hyperparameters now and returns the `Record`; use it with
`every=None`.

# Learn over folds, then train on everything

A validation set is expensive: its examples are not trained on, and hyperparameters can fit it. `hoptim.CrossValidated`
trains K models on K folds with the same hyperparameters. These move by the mean of K hypergradients, each for the examples
that its fold holds out. Then it trains one model on everything with the learned values.

>>> from hoptim import CrossValidated, retrain
>>> def loop(model, optimizer, examples):               # as above; the examples to train on are given, and serve both phases
...     for _ in range(200):
...         optimizer.zero_grad()
...         optimizer.loss(examples).backward()
...         optimizer.step()
>>> hparams = HyperParameters({"decay": torch.full((1, 5), 0.1)}, {"decay": constraints.positive})
>>> def make():
...     return nn.Linear(5, 1)
>>> def inner(model):
...     return torch.optim.SGD(model.parameters(), lr=0.1)
>>> cv = CrossValidated(make, hparams, train_loss, val_loss, inner=inner, examples=80, steps=200, folds=3)
>>> found = cv.fit(loop)
>>> found.model, len(found.models), [row["status"] for row in found.history[-2:]]
(Linear(in_features=5, out_features=1, bias=True), 3, ['FINISHED', 'FINISHED'])
>>> decay = found.hyperparameters["decay"][0]
>>> bool(decay[0] < decay[1:].min())
True

- **Folds.** A number, or what a splitter of scikit-learn yields, such as `folds=StratifiedKFold(3).split(x, y)`: grouped,
  repeated, ordered in time. `val_batches` divides the held-out examples into batches, or makes a `DataLoader` of them.
- **Steps.** The folds meet at the same share of their trainings, so the length of a training must be known: `steps`, or for
  a loop over epochs of batches of 50, `steps=lambda n: epochs * math.ceil(n / 50)`.
- **The loop is yours.** It waits inside `optimizer.step()` for the other folds. For this each fold has a thread, but only
  one runs at a time. Each fold has its own random numbers. The last training uses those of the process, and has the bits of
  a plain training with the learned values. Make schedulers inside the loop, since each training needs its own.
- **A frozen backbone** may be shared by all models, if the loop keeps it in `eval()`. If a training writes into a shared
  buffer, such as the running mean of a batch norm, an error names it, since one model would see what another holds out.
- **An ensemble.** `found.ensemble(x, of=lambda z: z.softmax(1))` is the mean of the folds' predictions.
- **Failures.** If the solve of one fold fails, nothing moves, and the record's `detail` names the fold.
- **Checkpoints.** With `cv.fit(train, checkpoint="fit.pt")` a fit that was killed resumes, to the same bits. The loop says
  where it can be saved, and what else changes in it: `for epoch in optimizer.resumable(range(epochs), scheduler):`. The file
  is written about once a minute, at an epoch that all folds reach between the same two hypersteps, or in the last training.
  It is always written between the two phases; without `resumable`, only then. Delete it to start again.
- **Several processes.** `make` returns the `DistributedDataParallel`, and each rank runs the same fit: `train` takes its
  share of each batch, and `val_batches=lambda held_out: [held_out[rank::size]]` that of the held-out examples. All ranks
  have the folds of the first.
- **Cost.** K trainings on a part of the data, one on all of it, and K solves for each of 25 hypersteps. `found.cost` is the
  wall-clock time relative to the last training. For a small net with three recipes a fit over three folds takes the time of
  5.2 to 6.0 trainings written by hand, with `hypersteps=60` of 6.4 to 7.0 ([measured](scripts/README.md#what-it-costs)).
- **The outer optimizer.** It is `hoptim.outer_adam(hparams, validation=examples)`, with the rates of the table above and the
  levels of decays, which 25 hypersteps may change by a factor of some hundreds. With an outer optimizer of your own, choose
  `hypersteps` for its rate: 60 for Adam at 0.1.

[cross_validated.py](scripts/examples/cross_validated.py) is an example on 200 digits. Over ten splits this was better than
each of five fixed decays and than the best of them by the same folds, on digits and with a CNN on Fashion-MNIST; on diabetes
data the latter was 2 % better, at twice the cost; on Boston housing both were even, and a lucky fixed decay was ahead; on
wine it was even with a fixed decay ([the study](scripts/README.md#cross-validation)).

# Learn over several trainings

Who trains several times anyway takes a single hyperstep after each whole training, and the next one begins with what it found.
That costs some 15 training steps, the weights are trained where the hypergradient is taken, and the validation loss is that of
exactly these hyperparameters. Steps are few, so take 3 times the rates of `hparams.optimizer()`, and for entries that share a
level 9 times, but no more than a tenth of the number of validation examples. Let the rates fall, and keep the best:

>>> from hoptim.recipes import WeightDecay
>>> def decayed(model, hparams, batch):
...     return val_loss(model, hparams, batch) + hparams.penalty(model)
>>> hparams = WeightDecay(make(), per="weight", start=1e-3)
>>> outer, losses = hparams.optimizer(validation=40), []
>>> for group in outer.param_groups:
...     group["lr"] *= 4 if "pull" in group else 3
>>> falling = torch.optim.lr_scheduler.ExponentialLR(outer, 0.85)
>>> for _ in range(8):
...     _ = torch.manual_seed(0)                         # the same start and batches, so that the losses can be compared
...     model = make()
...     problem = Problem(model, hparams, decayed, val_loss)
...     optimizer = BilevelOptimizer(inner(model), outer, problem, val_batches=[torch.arange(40, 80)], every=None)
...     loop(model, optimizer, torch.arange(20))
...     losses.append(optimizer.hyperstep().result.val_loss.item())
...     if losses[-1] == min(losses):
...         best = model
...     falling.step()
>>> losses[-1] < 0.7 * losses[0]
True

If a training diverges, no hyperstep leads back: go half-way to the best values, as in
[several_trainings.py](scripts/examples/several_trainings.py). There Optuna chooses what has no gradient, the width and the
batch size, and its dashboard shows each trial with the losses of its four trainings. With this loop hoptim was ahead of
Optuna or even with it at 4, 8 and 16 trainings in all 15 cells of [a study](scripts/README.md#against-tuners).

# Train again with what was learned

`retrain` trains a new model with the hyperparameters held fixed from the first step, on all examples, validation data
included. With example weights it ended at a lower loss than the run in all cases [measured](scripts/README.md#wrong-labels).
A learned rate, or another option that was learned, is that of the new optimizer too, with or without a schedule. A warning
says so if nothing had moved in the run, or if the loop takes no loss from `optimizer.loss`.

>>> final = retrain(optimizer.problem, make, loop, torch.arange(80), inner=inner)

# Mistakes show in the first second

Errors after an hour of warm-up are expensive, so the first steps are checked, except with `every=None`:

- **A dry run at the first loss** computes what a hyperstep does, with the first batches, and throws it away. It changes
  nothing: bits, `.grad`, modes, random streams and the order of batches are as without it. A validation loss under
  `no_grad`, a batch of another device or dtype, a hyperparameter that no loss uses, a tensor where torch wants a number
  (`label_smoothing=hparams["eps"]`), an operation without a second derivative, ranks whose weights differ, too little
  memory: each raises now what the first hyperstep would have raised. The dry run costs one hyperstep; `Unrolled` goes
  through a single step. By hand it is `optimizer.check(train_batch, val_batch)`.
- **The first step** warns if its gradient is not that of the training loss: something was added to `optimizer.loss(batch)`
  before `backward()`, which hypergradients cannot see. This is not checked on several ranks, for a compiled model or with a
  closure.
- **The next losses and steps**: a warning if the inner optimizer is stepped instead of the `BilevelOptimizer`, an error if
  `optimizer.loss` is never called.
- **The first hyperstep** warns if it takes most of a hyperparameter to zero, since the outer rate is too large then, and
  if it reaches so few entries of a large hyperparameter that each will hardly ever be visited.
- **Any hyperstep** warns if a weight is below 1 % of the norm that it had when training began. Too large a decay does this,
  and the model then hardly depends on its input. Models that learned, in scripts/arrive.py, kept 5 % of each weight or more.
- **The end** of a training that was too short for a hyperstep: a warning with the step after which the first would have come.

# Records, trackers and W&B

`hooks` are functions that get the `Record` of each hyperstep. Trackers are hooks: `hoptim.tracking` has `WandB`,
`TensorBoard`, `MLflow`, `JsonLines` and `Console`.

>>> from hoptim.tracking import JsonLines, WandB
>>> hooks = [WandB(project="mine"), JsonLines(path="metrics.jsonl")]   # BilevelOptimizer(..., hooks=hooks)

W&B is offline unless `mode` or the environment variable `WANDB_MODE` says otherwise. It never stops a training: without an
account or a network it warns and continues offline. `record.row()` is a flat dict for any other logger.

# Gradient accumulation and mixed precision

Both are written as usual. With accumulation, `(optimizer.loss(batch) / n).backward()` for each micro-batch: a hyperstep's
training loss is the mean over all batches whose losses went backward in the step. `hyperstep()` by hand, at another time
than `every` says, counts each loss since the last step equally.

A loop may fill the same tensors or arrays with each batch: where a hyperstep follows, the batches are copied. `hyperstep()`
by hand takes the tensors as they are, and refuses them if they were written to since their loss; writes through NumPy are
not seen there.

Under a bf16 `autocast` around the whole step, the losses of a hyperstep are computed in bf16 too. If the autocast ends
before `optimizer.step()`, or is fp16, they are computed in full precision. Products and solvers always have full
precision. With a `GradScaler`, `scaler.step(optimizer)` may skip a step; it then does not count.

# Checkpoints

`state_dict()` holds both optimizers, the hyperparameters, the counters, the solver's state and the position in
`val_batches`. Save it with the model and the scheduler. Resuming gives bit-identical results:

>>> _ = torch.manual_seed(1)
>>> whole, whole_scheduler = build()
>>> weights = {name: value.clone() for name, value in whole.problem.model.state_dict().items()}
>>> train(whole, whole_scheduler, 120)
>>> first, first_scheduler = build()
>>> first.problem.model.load_state_dict(weights)
<All keys matched successfully>
>>> train(first, first_scheduler, 60)
>>> parts = (first.problem.model, first, first_scheduler)
>>> saved = [part.state_dict() for part in parts]
>>> second, second_scheduler = build()
>>> for part, state in zip((second.problem.model, second, second_scheduler), saved):
...     _ = part.load_state_dict(state)
>>> train(second, second_scheduler, 60)
>>> torch.equal(second.problem.hparams["decay"], whole.problem.hparams["decay"])
True

Everything that hoptim saves can be read with `torch.load(weights_only=True)`, the default. Other things in a script's
checkpoint may not: torchvision's reference script puts an `argparse.Namespace` into its checkpoint. Save `vars(args)`
instead, or call `torch.serialization.add_safe_globals([argparse.Namespace])` before loading.

The state of a run that was begun without hoptim is taken too, with a warning: the inner optimizer goes on from there, and a
learned rate as far down as that run's schedule had come.

The helpers of `torch.distributed.checkpoint` drop keys that they do not know. Give them `optimizer.inner`, save
`optimizer.state_dict()["hoptim"]` beside it, and load both with
`optimizer.load_state_dict({**optimizer.inner.state_dict(), "hoptim": saved})`.

# Ten public scripts

hoptim was dropped into ten scripts as they are, with a learned decay for each tensor: pytorch/examples `mnist`,
`word_language_model`, `imagenet`, `vae` and `time_sequence_prediction`, nanoGPT, torchvision's `references/classification`,
and an example each of Lightning, Accelerate and PyG. It took 9 to 14 added lines, losses included, and 1 to 3 changed ones;
more, up to 19, in scripts whose loss is written inside the loop or serves validation too. With `every=None` and a penalty of
zero each ends in the bits of the original. Learning the decays gained nothing in any of them; where validation data may be
trained on, that is worth more. Weights for the examples gained in loss where 40 % of the labels were wrong. [The changes,
their counts and the figures](scripts/examples/public/README.md).

# Lightning, Accelerate and the Hugging Face Trainer

For each there is a short script (`pip install '.[frameworks,data]'`), and a test that its run is bit for bit that of a
plain loop, and a resumed run that of an uninterrupted one.

| framework | the one line | script |
|---|---|---|
| Lightning | `return self.optimizers().loss(batch)` in `training_step`; `configure_optimizers` makes hparams, problem and optimizer | [lightning_digits.py](scripts/examples/lightning_digits.py) |
| Accelerate | `accelerator.backward(bilevel.loss(batch))`; `prepare` the model, make the problem, `prepare` the optimizer | [accelerate_digits.py](scripts/examples/accelerate_digits.py) |
| Trainer | `return self.optimizer.optimizer.loss(inputs)` in `compute_loss` | [trainer_text.py](scripts/examples/trainer_text.py) |

Clipping, accumulation, bf16, schedulers and checkpoints are the framework's own. Hypersteps are counted in optimizer
steps.

- Accelerate: give `val_batches` as they were before `prepare()`. Accelerate asks the loader that was started last whether an
  accumulation has ended, and that would be the wrong one. An error says so.
- Trainer: set `model_accepts_loss_kwargs = False`, or accumulated gradients are not divided. Label smoothing is not seen.
  On several GPUs the Trainer wraps the model itself: put `problem.wrapper = model` into `compute_loss`.
- Lightning: its autocast ends before the hyperstep, which therefore runs in float32. It saves no random state: seed the
  shuffling with the number of the epoch.

# Several processes

Give `Problem` the wrapped model, `hoptim.Problem(DistributedDataParallel(net), hparams, train_loss, val_loss)`. The rest
of the loop stays the same.

Each process (rank) has batches of its own. L_T and L_V are the means over the ranks, as in DDP. Products, right-hand
sides and mixed products are averaged *inside* the solve, so the hypergradient is that of one process on the joint batch.
The mean of the solutions that each rank would find alone is a different, wrong answer. The hyperparameters start with
rank 0's values, and after 200 hypersteps they and the outer optimizer's state are bit-identical on all ranks. If weights
differ between ranks, the first loss raises an error; if they come apart later, because gradients are not averaged, the
first hyperstep. A NaN on one rank gives the same status on all. Only rank 0 logs. An audit is for one process.
Give `process_group=None` if each rank trains alone.

The state of rank 0 alone, loaded on all ranks, resumes a run to the bit if its `val_batches` draw no random numbers. If they
do, the other ranks go on with rank 0's numbers; and if `Unrolled` steps are under way, with rank 0's batches, which the status
`REPLAY_DIFFERS` tells. Then save `optimizer.state_dict()` of each rank, and load it on the same rank, as `scripts/train.py` does.

*What N ranks cost.* A hypergradient makes K + 3 all-reduces: L_V with g and ∂L_V/∂λ (n + h numbers for n weights and h
hyperparameters), L_T with F (n), one of n for each of K products, and Bᵀx (h). A training step makes one of n. With the
default, K = 5 and `every=100`, that is 8 for every 100, not overlapped with computation. A ring sends 2n(N − 1)/N numbers
through each rank however many there are, and its latency grows with N; a tree's latency grows with log N. At 1,000 ranks
small models pay latency, K + 3 times for each hyperstep, and large ones bandwidth, which does not grow. R right-hand
sides go through one all-reduce of R·n. Not run here: more than three ranks, NCCL, more than one machine.

# What it works with

Each row is tested, and what is computed is compared by value: with the bare optimizer, a plain loop, plain autograd on a
copy, or dense linear algebra in float64. For models, see `hoptim.problem`.

| optimizers and schedulers | | tests |
|---|---|---|
| every class of `torch.optim`, fused and foreach ones, several groups, any other subclass of `Optimizer` | `every=None` is the bare optimizer bit for bit, `state_dict()` included; right hypergradients; resumable. `Unrolled` and `Update` need one that torch can differentiate | [inner](tests/training/test_inner_optimizers.py) |
| Muon with AdamW for the rest | wrap one of them, and call the other's `step()` before the wrapper's; a warning names the weights that the wrapped one does not hold, which is right here | [inner](tests/training/test_inner_optimizers.py) |
| every class of `torch.optim.lr_scheduler`, and `SWALR` | on the wrapper, bit for bit; for the outer rate, on `optimizer.outer`; beside a learned rate or momentum it sets the shape; one that would overwrite a leaf is an error | [schedulers](tests/training/test_schedulers.py), [learned options](tests/training/test_computed_options.py) |
| clipping, `AveragedModel`, EMA, `update_bn`, hooks of step and state, `add_param_group` during training | as with the inner optimizer | [inner](tests/training/test_inner_optimizers.py) |
| **loops** | | |
| gradient accumulation | the hypergradient sees all micro-batches of the step, with the shares that their backward passes began with | [loops](tests/training/test_loops.py) |
| bf16 `autocast`, fp16 with `GradScaler` | losses in bf16 where yours are, in full precision where yours are in fp16; products and solvers in full precision; a skipped step does not count | [precision](tests/problem/test_mixed_precision.py) |
| `DataLoader` with workers; batches of any kind; closures; early stopping | an empty or exhausted source of batches is an error that names it | [loops](tests/training/test_loops.py) |
| a `DataLoader` that shuffles, or whose transforms draw from torch, Python or NumPy, as `val_batches` or `train_batches` | a run with hypersteps that move nothing has the bits of one without; resumed to the bit amid a pass | [random](tests/training/test_random_streams.py) |
| a frozen backbone that the models of a fit, or of a run and its retraining, share | the bits of models with copies of it; refused once a training writes into its buffers | [shared](tests/training/test_shared.py) |
| `retrain`, with learned options and schedules | a plain loop with the learned values; for a schedule the schedule's numbers times the learned value over its start | [retrain](tests/training/test_retrain.py), [options](tests/training/test_retrain_options.py) |
| `CrossValidated`: mini-batches, schedulers, clipping, accumulation, autocast, `GradScaler`, shuffling loaders, trackers, a learned rate; folds of unequal size and length, stratified, grouped, ordered in time | K separate loops and the mean of their `hypergradient`s to 1e-9; each training has the bits of a plain one in its random stream | [folds](tests/training/test_cross_validated.py), [loops](tests/training/test_cross_validated_loops.py) |
| checkpoints of a fit, in both phases, with dropout, schedulers and shuffling loaders | the bits of an uninterrupted fit, wherever it was left; after SIGKILL too; another fit's file is refused, and what differs is named | [resumable](tests/training/test_resumable.py), [kill](tests/integration/test_kill.py) |
| Lightning, Accelerate, Trainer | as above | [frameworks](tests/integration/test_frameworks.py) |
| **several processes** | | |
| DistributedDataParallel, `no_sync`, uneven batches, subgroups, outputs beside the loss; Lightning and Accelerate on two ranks | the hypergradient of one process on the joint batch, to 1e-9; uneven last batches: the mean of the ranks' means | [distributed](tests/integration/test_distributed.py), [frameworks](tests/integration/test_frameworks.py) |
| `CrossValidated` on two ranks, `no_sync`, unequal folds | one process on the joined batches, to 1e-9; resumed to the bit on each rank | [ranks](tests/integration/test_cross_validated_ranks.py) |
| FSDP, tensor-parallel weights | an error at construction that says what works | [distributed](tests/integration/test_distributed.py), [kinds](tests/problem/test_model_kinds.py) |
| **faults** | | |
| NaN, or an error inside a loss | hyperparameters and outer state stay as they are, to the bit; the failure is named | [faults](tests/integration/test_faults.py) |
| `scripts/train.py` and SIGKILL at a random moment | `resume=true` ends with identical bits: 50 of 50 in one process, 50 of 50 in two | [kill](tests/integration/test_kill.py) |
| a full or read-only disk | an error with file and remedy, and the last checkpoint stays whole; trackers warn and continue | [faults](tests/integration/test_faults.py) |
| a damaged checkpoint, one of another model or under other constraints, an older or newer version | read, or refused as a whole, with names and shapes; `torch.load(weights_only=True)` reads all | [checkpoints](tests/training/test_checkpoints.py), [constraints](tests/training/test_other_constraints.py) |
| 10,000 hypersteps | no more tensors, files or threads than before, and less than 4 MB | [faults](tests/integration/test_faults.py) |
| wrong calls, 289 of them | each with the error's class and the words that it must contain | [bad input](tests/training/test_bad_input.py), [arguments](tests/training/test_arguments.py) |

# Limits

- Each rank decides by itself, from the same averaged numbers. Ranks need the same hardware and software, or one may stop a
  solve that another continues.
- A loader with `persistent_workers` and random transforms: after a resume the workers are new, and draw other numbers from
  the second pass on. Without `persistent_workers` each pass is resumed to the bit.
- Tested on CPU, with torch 2.8 to 2.15 and gloo. No GPU was available: the code does not depend on the device, but has not
  been tried there. The same holds for cuDNN's RNNs (cuDNN is switched off inside), SyncBatchNorm with several ranks, and
  NCCL.
"""

# ruff: noqa: E501 (a row of a table has to be one line)
