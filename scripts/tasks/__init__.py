"""The tasks of hoptim's own experiments: data, model, losses and hyperparameters."""
