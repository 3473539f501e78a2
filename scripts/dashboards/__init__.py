"""What scripts/dashboard is made of: the panels, the page of HTML that shows them, and the same ones for W&B."""
