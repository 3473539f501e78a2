"""The parts of scripts/benchmark.py: the problems, how time and memory are measured, and the sections."""
