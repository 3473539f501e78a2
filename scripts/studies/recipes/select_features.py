"""Which of 65 features to keep? Gates learned over three folds, beside the lasso, on ten splits of diabetes.

    python scripts/examples/select_features.py [--splits 10 11 ...]

The features are the ten measurements of 442 patients, their squares and their products; 220 patients are there to learn
from, 222 are the test set. Each method chooses features, and least squares on these features is tested; so are the lasso
itself and least squares on all features. The price of a gate was chosen on splits 0 to 4.
"""

import argparse
import statistics

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LassoCV, LinearRegression
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

import hoptim
from hoptim.recipes import Gate

PRICE, STEPS, COUNT = 0.02, 1200, 220


def split(number):
    x, y = load_diabetes(return_X_y=True)
    x = PolynomialFeatures(2, include_bias=False).fit_transform(StandardScaler().fit_transform(x))
    order = np.random.default_rng(number).permutation(len(x))
    train, test = order[:COUNT], order[COUNT:]
    scale = StandardScaler().fit(x[train])
    y = (y - y[train].mean()) / y[train].std()
    return scale.transform(x[train]), y[train], scale.transform(x[test]), y[test]


def chosen_by_gates(x, y, seed, price=PRICE):
    """Which gates are open after cross-validation, and its cost in plain trainings."""
    torch.manual_seed(seed)
    x, y, count = torch.tensor(x).float(), torch.tensor(y).float(), x.shape[1]

    def train_loss(model, gate, batch):
        return (model(x[batch] * gate.values())[:, 0] - y[batch]).square().mean()

    def val_loss(model, gate, batch):
        error = (model(x[batch] * gate.values(training=False))[:, 0] - y[batch]).square().mean()
        return error + price * gate.count()

    def train(model, optimizer, examples):
        for _ in range(STEPS):
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    gate = Gate(count, start=0.5)
    fit = hoptim.CrossValidated(
        lambda: torch.nn.Linear(count, 1), gate, train_loss, val_loss,
        inner=lambda model: torch.optim.Adam(model.parameters(), lr=0.01), examples=COUNT, steps=STEPS, hypersteps=150,
        outer=torch.optim.Adam(gate.parameters(), lr=0.1),
    ).fit(train)  # fmt: skip
    return gate.harden()[0].numpy(), fit.cost


def rows(number, price=PRICE):
    """The test error and the number of features of each row, and the cost of the gates."""
    x, y, x_test, y_test = split(number)

    def error(model):
        return float(((model.predict(x_test) - y_test) ** 2).mean())

    def squares(kept):
        kept = np.flatnonzero(kept)
        model = LinearRegression().fit(x[:, kept], y)
        return float(((model.predict(x_test[:, kept]) - y_test) ** 2).mean()), len(kept)

    lasso = LassoCV(cv=3, random_state=0, max_iter=20_000).fit(x, y)
    gates, cost = chosen_by_gates(x, y, number, price)
    return {
        "all features": squares(np.ones(x.shape[1])),
        "the ten measurements": squares(np.arange(x.shape[1]) < 10),
        "lasso": (error(lasso), int((lasso.coef_ != 0).sum())),
        "lasso, least squares on its features": squares(lasso.coef_ != 0),
        "gates, least squares on their features": squares(gates),
    }, cost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="+", type=int, default=list(range(10, 20)))
    parser.add_argument("--price", type=float, default=PRICE, help="of an open gate, in the validation loss")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [rows(number, given.price) for number in given.splits]
    print(f"splits {given.splits}: squared error on the test set, minus that of the lasso (paired), features")
    for row in found[0][0]:
        errors, sizes = zip(*(one[row] for one, _ in found), strict=True)
        ahead = [one[row][0] - one["lasso"][0] for one, _ in found]
        spread = statistics.stdev(ahead) / len(ahead) ** 0.5 if len(ahead) > 1 else float("nan")
        means = f"{statistics.mean(errors):.4f}  {statistics.mean(ahead):+.4f} ± {spread:.4f}"
        print(f"  {row:40} {means}  {statistics.mean(sizes):5.1f}")
    print(f"the gates cost {statistics.mean(cost for _, cost in found):.1f} plain trainings")
