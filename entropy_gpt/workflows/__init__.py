"""Workflows: convert, train, evaluate, infer privately, publish."""
