"""The `vimpac` command, one file a subcommand."""
