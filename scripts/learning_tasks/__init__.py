"""The parts of scripts/defaults.py: the learning tasks, settings, trainings, scores, tables and the picture."""
