"""What scripts/tuners.py is made of: problems, costs, the ways to tune, their curves and the picture."""
