"""The parts of scripts/train.py: the tasks (data, models, losses, hyperparameters), runs, checkpoints, processes, plots."""
