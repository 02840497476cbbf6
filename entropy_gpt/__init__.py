"""The `entropy-gpt` command, and its workflows for Python."""
