"""What scripts/fidelity.py needs: the problems with their truth, the table of methods, the paper's own figure."""
