"""Curvatures: the matrix A = ∂F/∂w at a point, and B = ∂F/∂λ. See hoptim/curvature/README.md."""
