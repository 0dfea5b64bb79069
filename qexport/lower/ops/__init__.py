"""The translations of operators into ONNX; importing this package registers those of all its files."""

from importlib import import_module
from pkgutil import iter_modules

for _found in iter_modules(__path__, f"{__name__}."):
    import_module(_found.name)
