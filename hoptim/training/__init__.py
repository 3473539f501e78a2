"""The code that changes anything: the optimizer, its record and its checkpoint."""
