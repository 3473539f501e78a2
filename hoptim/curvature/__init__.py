"""F at a point with its derivatives: A = ∂F/∂w and B = ∂F/∂λ."""
