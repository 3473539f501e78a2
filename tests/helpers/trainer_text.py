"""Hugging Face Trainer: a tiny BERT that classifies short reviews, with a learned decay for each of its tensors."""

import torch
from reviews import WORDS, reviews, tokenizer
from torch.distributions import constraints
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hoptim

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def train_loss(model, hparams, batch):
    return model(**batch).loss + sum(hparams[name] * p.square().sum() for name, p in model.named_parameters())


def val_loss(model, hparams, batch):
    return model.eval()(**batch).loss


class BilevelTrainer(Trainer):
    """A Trainer for ``optimizers=(BilevelOptimizer, scheduler)``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # our loss is a mean, so the Trainer has to divide it when it accumulates

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:  # evaluation
            return super().compute_loss(model, inputs, return_outputs)
        return self.optimizer.optimizer.loss(inputs)  # self.optimizer is Accelerate's wrapper of ours


def make(folder, **options):
    arguments = TrainingArguments(folder, **options)
    model, words = BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **SIZE)), tokenizer()
    decays = {name: torch.tensor(1e-4) for name, _ in model.named_parameters()}
    hparams = hoptim.HyperParameters(decays, dict.fromkeys(decays, constraints.positive)).to(arguments.device)
    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    inner = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    outer = torch.optim.Adam(hparams.parameters(), lr=0.2)
    train, val = reviews(words, 400, 0.3, seed=0), reviews(words, 200, 0.0, seed=1)
    val_batches = [words.pad(val, return_tensors="pt").to(arguments.device)]
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=val_batches, every=10, warmup=20)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    data = {"train_dataset": train, "eval_dataset": val, "processing_class": words}
    return BilevelTrainer(model, arguments, optimizers=(optimizer, scheduler), **data)


if __name__ == "__main__":
    trainer = make("runs/trainer", per_device_train_batch_size=40, num_train_epochs=15, report_to="none")
    trainer.train()
    trainer.save_model()
    decays = trainer.optimizer.optimizer.record.hyperparameters
    print(trainer.evaluate(), {name: value.item() for name, value in decays.items() if "embeddings.weight" in name})
