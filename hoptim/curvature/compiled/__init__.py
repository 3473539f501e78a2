"""Compiled products with A = ∂F/∂w and Bᵀ: trace, split, compile, run.

- ``derivatives``: L_T, F = ∇_w L_T, A v and Bᵀv as one function of tensors: w, λ, buffers, the batch and v.
- ``splitting``: traces it to a graph, cuts the graph by what depends on v, and compiles the pieces.
- ``products``: a program, which is these pieces, and the products that it gives at a point.
- ``programs``: keeps a problem's programs, and checks them by value against plain PyTorch.
"""
