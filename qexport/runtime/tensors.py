"""Tensors of an exported file."""

from pathlib import Path

import numpy as np
import onnx


def tensor_of(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """The values of an initializer whose bytes may be beside the model, a copy.

    onnx reads no file that has several hard links, and `optimize` gives the data one; so the bytes are read here.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor).copy()
    entries = {entry.key: entry.value for entry in tensor.external_data}
    whole = onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    with open(folder / Path(entries["location"]).name, "rb") as file:  # nothing outside of the folder
        file.seek(int(entries.get("offset", 0)))
        whole.raw_data = file.read(int(entries["length"]))
    return onnx.numpy_helper.to_array(whole).copy()
