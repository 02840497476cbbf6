"""The quickstart: every workflow once, on small models."""
