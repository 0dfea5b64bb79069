"""Records a step of an exported decoder as a CUDA graph on stand-in libraries, and prints what that was.

Run as a script in the environment of `build_stand_ins`, with STAND_IN_LAUNCHES: argv is the folder and the length of
the cache.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto

folder, length = Path(sys.argv[1]), int(sys.argv[2])
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
for key, value in json.loads((folder / "manifest.json").read_text())["session"].items():
    options.add_session_config_entry(key, value)
provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
session = onnxruntime.InferenceSession(folder / "model.onnx", options, [provider])
binding, sizes = session.io_binding(), {"batch_size": 1, "sequence_length": 1}
sizes |= {"total_sequence_length": length, "past_sequence_length": length}
events = Path(os.environ["STAND_IN_LAUNCHES"])
held = {}
KINDS = {"int64": np.int64, "float16": np.float16, "bfloat16": TensorProto.BFLOAT16}


def on_device(value) -> onnxruntime.OrtValue:
    kind = next(kind for name, kind in KINDS.items() if f"({name})" in value.type)
    shape = [sizes.get(n, n) for n in value.shape]
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind, "cuda", 0)


for value in session.get_inputs():
    held[value.name] = on_device(value)
    binding.bind_ortvalue_input(value.name, held[value.name])
for value in session.get_outputs():
    past = value.name.replace("present", "past_key_values")
    held[value.name] = held[past] if past in held else on_device(value)
    binding.bind_ortvalue_output(value.name, held[value.name])
events.write_text("")
session.run_with_iobinding(binding)
lines = events.read_text().splitlines()
begin, end = lines.index("# graph begins"), lines.index("# graph ends")
events.write_text("")
session.run_with_iobinding(binding)
print(json.dumps({"recorded": lines[begin + 1 : end], "replayed": events.read_text().splitlines()}))
