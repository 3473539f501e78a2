"""FSDP2: digits with a learned weight decay for each tensor, the weights sharded over all processes.

torchrun --nproc-per-node=2 scripts/examples/sharded.py
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import hoptim

saved = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sharded", "step300")  # on a disk that all processes see
distributed.init_process_group("gloo")  # "nccl" on GPUs
rank, ranks = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(0)
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x, order = x.float() / 16, torch.randperm(len(x))
train, val = order[:400], order[400:600]
y[train[:80]] = torch.randint(10, (80,))  # wrong labels
batches = [train[torch.randperm(400)[:48]] for _ in range(600)]
criterion = nn.CrossEntropyLoss()

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
for layer in (model[0], model[2], model):
    fully_shard(layer)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def compute_loss(model, hparams, batch):
    return criterion(model(x[batch]), y[batch]) + hparams.penalty(model)


hparams = hoptim.recipes.WeightDecay(model)
problem = hoptim.Problem(model, hparams, compute_loss)
optimizer = hoptim.BilevelOptimizer(
    optimizer, hparams.optimizer(), problem, val_batches=[val[rank::ranks]], every=40, warmup=150
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
if saved.exists():  # the run goes on, on any number of processes
    hoptim.load_checkpoint(saved, optimizer, scheduler)
for batch in batches[optimizer.inner_steps :]:
    optimizer.zero_grad()
    optimizer.loss(batch[rank::ranks]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    if optimizer.inner_steps == 300:
        hoptim.save_checkpoint(saved, optimizer, scheduler)
if rank == 0:
    print({name: f"{value.item():.3g}" for name, value in optimizer.record.hyperparameters.items()})
distributed.destroy_process_group()
