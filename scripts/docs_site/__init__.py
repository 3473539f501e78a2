"""What scripts/docs is made of: the builder, and a theme for pdoc."""
