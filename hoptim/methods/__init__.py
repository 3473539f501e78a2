"""Methods: ways to the hypergradient dL_V/dλ. See hoptim/methods/README.md."""
