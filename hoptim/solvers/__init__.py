"""Solvers of Aᵀx = g, and how a solve ends. See hoptim/solvers/README.md."""
