"""Compiled products with A = ∂F/∂w and Bᵀ: trace, split, compile, run.

- ``derivatives``: L_T, F = ∇_w L_T, A v and Bᵀv as one function of tensors: w, λ, buffers, the batch and v.
- ``splitting``: traces a function to a graph, cuts pieces out of it, and compiles them.
- ``program``: splits that graph into what runs once for each point and what runs for each product, and runs it.
- ``programs``: keeps a problem's programs by shape, and checks their values against plain PyTorch.
"""
