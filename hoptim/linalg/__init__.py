"""Linear algebra on the weights of a model: vectors, operators, Lanczos. It imports torch and nothing else of hoptim.

Operators are made from operators: a transpose, a shift by damping, a mean over batches or processes, a diagonal scaling.
So a solver needs to know none of these.
"""
