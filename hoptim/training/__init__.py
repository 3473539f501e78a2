"""The training loop: ``BilevelOptimizer``, ``CrossValidated``, ``retrain``. See hoptim/training/README.md."""
