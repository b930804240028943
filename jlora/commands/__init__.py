"""The subcommands of `jlora`: each a dataclass of settings and a function that returns a JSON-able result."""
