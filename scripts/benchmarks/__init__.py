"""What scripts/benchmark.py is made of: the problems, how things are measured, and the sections."""
