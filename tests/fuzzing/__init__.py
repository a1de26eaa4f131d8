"""Readers given random and mutated files: ``python -m tests.fuzzing``."""
