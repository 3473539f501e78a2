"""The parts of scripts/fidelity.py: the problems and their true hypergradients, the methods, rankings and pictures."""
