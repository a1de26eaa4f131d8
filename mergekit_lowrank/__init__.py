"""Merge low-rank adapters (LoRA) exactly, one module at a time, in bounded memory."""
