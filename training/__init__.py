"""Training of EntropyGPT models."""
