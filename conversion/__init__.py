"""Conversion of GPT-2 checkpoints (in preparation)."""
