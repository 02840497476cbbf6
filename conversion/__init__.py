"""Conversion of trained GPT-2s to architectures for private inference."""
