"""Targets: what an export is made for. One module here is one target, named as the target is; see `base`.

Each registers itself when it is imported, as targets outside of this package do. `BUILT_IN` names those of this folder
without importing any.
"""

from pkgutil import iter_modules

BUILT_IN = tuple(sorted(m.name for m in iter_modules(__path__) if not m.ispkg and m.name != "base"))
