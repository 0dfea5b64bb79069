"""The kinds of sources, one file each; see `registry.Source`."""
