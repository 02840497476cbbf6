"""Evaluation of EntropyGPT models."""
