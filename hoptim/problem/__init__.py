"""Models and losses: a problem as pure functions of weights, hyperparameters and a batch. See hoptim/problem/README.md."""
