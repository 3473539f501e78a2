"""Accelerate's nlp_example told again for small data: three layers of MiniLM learn which State of the Union address is old.

    python scripts/studies/public/run.py scripts/studies/public/fine_tuning.py --text sotu.txt [--minilm NAME] [--joined]

Passages of 30 words from addresses before 1830 and after 1949, 240 for training and 60 for validation; the test loss is of
600 from other addresses. ``--joined`` trains on the 60 too, without hoptim; ``--alone`` is without hoptim as well. As in
the original, all goes through ``prepare()``, gradients are accumulated by hand, and the learning rate falls linearly.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

import hoptim

WORDS, SIZES = 30, {"train": (0.6, 240), "val": (0.2, 60), "test": (0.2, 600)}  # shares of the addresses, and passages
FIRST, LAST = 40, 72  # the addresses of 1790 to 1829, and those from 1950 on


def passages(path, tokenizer, seed):
    """Tokens and labels of each part; no address is in two parts."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    draw, parts = torch.Generator().manual_seed(seed), {name: [] for name in SIZES}
    for label, era in enumerate((lines[:FIRST], lines[-LAST:])):
        order, begun = torch.randperm(len(era), generator=draw).tolist(), 0
        for name, (share, size) in SIZES.items():
            ended = begun + round(share * len(era))
            found = []
            for i in order[begun:ended]:
                ids = torch.tensor(tokenizer(era[i], add_special_tokens=False)["input_ids"])
                found.append(ids[: len(ids) // WORDS * WORDS].view(-1, WORDS))
            begun, pool = ended, torch.cat(found)
            pool = pool[torch.randperm(len(pool), generator=draw)[: size // 2]]
            pool = F.pad(F.pad(pool, (1, 0), value=tokenizer.cls_token_id), (0, 1), value=tokenizer.sep_token_id)
            parts[name].append((pool, torch.full((len(pool),), label)))
    return {name: tuple(map(torch.cat, zip(*both, strict=True))) for name, both in parts.items()}


def main(options, epochs=3, batch_size=8, accumulated=2):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parts = passages(options.text, AutoTokenizer.from_pretrained(options.minilm), options.seed)
    torch.manual_seed(options.seed)
    learns = not (options.alone or options.joined)
    given = tuple(map(torch.cat, zip(parts["train"], parts["val"], strict=True))) if options.joined else parts["train"]
    accelerator = Accelerator(cpu=True)
    model = AutoModelForSequenceClassification.from_pretrained(options.minilm, num_hidden_layers=3, num_labels=2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.0 if learns else 0.01)
    loader = DataLoader(TensorDataset(*given), batch_size, shuffle=True, drop_last=True)
    steps = epochs * len(loader) // accumulated
    if learns:

        def val_loss(model, hparams, batch):
            return model.eval()(batch[0], labels=batch[1]).loss

        def train_loss(model, hparams, batch):
            return model(batch[0], labels=batch[1]).loss + hparams.penalty(model)

        hparams = hoptim.recipes.WeightDecay(model)
        problem = hoptim.Problem(model, hparams, train_loss, val_loss)
        outer, warmup = hparams.optimizer(), steps // 4
        optimizer = hoptim.BilevelOptimizer(optimizer, outer, problem, val_batches=[parts["val"]], every=10, warmup=warmup)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if learns:
        problem.wrapper = model
    for _ in range(epochs):
        model.train()
        for step, batch in enumerate(loader):
            loss = optimizer.optimizer.loss(batch) if learns else model(batch[0], labels=batch[1]).loss
            accelerator.backward(loss / accumulated)
            if step % accumulated == accumulated - 1:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    with torch.no_grad():
        logits = torch.cat([model.eval()(tokens).logits for tokens in parts["test"][0].split(200)])
    right = (logits.argmax(1) == parts["test"][1]).float().mean()
    print(f"test loss {F.cross_entropy(logits, parts['test'][1]):.5f}, accuracy {right:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="an address on each line, from 1790 to 2021")
    parser.add_argument("--minilm", default="sentence-transformers/all-MiniLM-L6-v2", help="a folder, or a name on the hub")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--joined", action="store_true")
    main(parser.parse_args())
