"""Linear algebra on the weights of a model: vectors, operators, Lanczos. See hoptim/linalg/README.md."""
