"""The subcommands of `entropy-gpt`: their options, one file each."""
