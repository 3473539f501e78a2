"""The parts of scripts/tuners.py: the problems, costs, ways to tune, curves, tables and pictures."""
