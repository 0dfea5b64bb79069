"""The translations of operators into ONNX; importing this package registers those of all its files."""

from ...plugins import import_folder

import_folder(__name__)
