"""Ways to the hypergradient dL_V/dλ."""
