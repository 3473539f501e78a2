"""Solvers of Aᵀx = g. They see an operator and a vector, never a model."""
