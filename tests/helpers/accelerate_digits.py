"""Accelerate: digits with 40 % wrong training labels, and a learned weight for each of them."""

import torch
from accelerate import Accelerator
from digits import digits, example_weights, network, train_loss, val_loss
from torch.utils.data import DataLoader, TensorDataset

import hoptim


def prepare(accelerator, train, val):
    """Prepare the model first, make the problem with the result, and then prepare the optimizer."""
    net, loader = accelerator.prepare(network(), DataLoader(TensorDataset(*train), 100, shuffle=True))
    learned = example_weights().to(accelerator.device)
    problem = hoptim.Problem(net, learned, train_loss, val_loss)
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    outer = torch.optim.Adam(learned.parameters(), lr=0.1)
    val = [part.to(accelerator.device) for part in val]  # not by prepare()
    bilevel = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[val], every=10, warmup=60)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(bilevel, T_max=1200)
    return net, bilevel, loader, *accelerator.prepare(bilevel, scheduler)


def epoch(accelerator, net, bilevel, loader, optimizer, scheduler):
    for batch in loader:
        with accelerator.accumulate(net):
            accelerator.backward(bilevel.loss(batch))  # was: F.cross_entropy(net(x), y)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    torch.manual_seed(0)
    accelerator, (train, val, test) = Accelerator(), digits()
    prepared = prepare(accelerator, train, val)
    for _ in range(200):
        epoch(accelerator, *prepared)
    accuracy = (prepared[0](test[0].to(accelerator.device)).argmax(1).cpu() == test[1]).float().mean()
    print(f"test accuracy {accuracy:.3f}")
