"""What defaults.py is made of: the learning tasks, the settings, the training, the scores and the picture."""
