"""Vectors, operators and Lanczos: it imports torch and nothing else."""
