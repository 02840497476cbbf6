"""Two-party private inference of EntropyGPT models."""
