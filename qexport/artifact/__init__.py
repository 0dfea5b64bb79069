"""The output folder: who owns it, what lies in it, how it appears. A leaf: everybody may read it."""
