"""The parts of scripts/docs: the builder, and a theme for pdoc."""
