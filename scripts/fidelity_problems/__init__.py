"""What scripts/fidelity.py is made of: the problems with their truth, the table of methods, the figure of the paper."""
