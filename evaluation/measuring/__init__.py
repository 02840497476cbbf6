"""Measurements of a model: perplexity, attention entropy, operation counts, task scores, remote loading."""
