"""The commands, one a module; see `app`."""
