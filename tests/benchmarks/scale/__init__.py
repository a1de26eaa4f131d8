"""Merges larger than memory: what they hold at most, how fast weights are folded into a base, and what stays exact."""
