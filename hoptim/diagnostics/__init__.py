"""Is this hypergradient right, on this model?"""
