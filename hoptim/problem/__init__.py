"""A model and two losses as pure functions of weights, hyperparameters and a batch."""
