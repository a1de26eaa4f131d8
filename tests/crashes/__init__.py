"""Merges that are killed: ``python -m tests.crashes``."""
