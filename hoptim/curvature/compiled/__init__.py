"""Products with A and Bᵀ by compiled graphs."""
