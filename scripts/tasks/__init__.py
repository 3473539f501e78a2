"""What scripts/train.py is made of: the tasks (data, model, losses, hyperparameters), checkpoints, processes and plots."""
