"""A file for each architecture; see `base.VisionLanguage`."""
