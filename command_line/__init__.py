"""The `entropy-gpt` command."""
