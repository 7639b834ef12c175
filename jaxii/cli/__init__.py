"""The command line: one module a command, with its flags, its help and its `run`."""
