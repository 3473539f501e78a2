"""Strategies for the linear system Aᵀx = g."""
