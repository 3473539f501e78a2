"""The audit: is this hypergradient right, on this model? See hoptim/diagnostics/README.md."""
