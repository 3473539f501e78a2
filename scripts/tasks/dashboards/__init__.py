"""The parts of scripts/dashboard: the panels, the page of HTML that shows them, and the same panels on W&B."""
