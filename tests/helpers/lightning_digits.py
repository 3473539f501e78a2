"""Lightning, automatic optimization: digits with 40 % wrong training labels, and a learned weight for each of them."""

import lightning as L
import torch
from digits import digits, example_weights, network, train_loss, val_loss
from torch.utils.data import DataLoader, TensorDataset

import hoptim


class Digits(L.LightningModule):
    def __init__(self, val):
        super().__init__()
        self.val, self.net = val, network()

    def configure_optimizers(self):
        learned = example_weights().to(self.device)  # saved with the optimizer, not with this module
        problem = hoptim.Problem(self.net, learned, train_loss, val_loss)
        inner = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        outer = torch.optim.Adam(learned.parameters(), lr=0.1)
        val = [part.to(self.device) for part in self.val]
        optimizer = hoptim.BilevelOptimizer(
            inner, outer, problem, val_batches=[val], every=10, warmup=60, hooks=[self.log_record]
        )
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)]  # stepped once an epoch

    def training_step(self, batch, _):
        return self.optimizers().loss(batch)  # was: F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, _):
        self.log("val_loss", val_loss(self.net, None, batch))

    def log_record(self, record):
        numbers = {key: float(value) for key, value in record.row().items() if isinstance(value, (int, float))}
        self.log_dict({f"hyper/{key}": value for key, value in numbers.items()})


if __name__ == "__main__":
    L.seed_everything(0)
    train, val, test = digits()
    module = Digits(val)
    trainer = L.Trainer(max_epochs=200, check_val_every_n_epoch=50, log_every_n_steps=5, default_root_dir="runs/lightning")
    trainer.fit(module, DataLoader(TensorDataset(*train), 100, shuffle=True), DataLoader(TensorDataset(*val), 200))
    print(f"test accuracy {(module.net(test[0]).argmax(1) == test[1]).float().mean():.3f}")
