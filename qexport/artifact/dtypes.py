"""The dtypes that what stays float can have in an export: one table for manifests, lowering, runtime and validation."""

from dataclasses import dataclass

from onnx import TensorProto


@dataclass(frozen=True)
class FloatType:
    """A float dtype.

    Attributes:
        name: what manifests and PyTorch call it; session: what sessions of ONNX Runtime call it.
        onnx: its element type in ONNX.
        in_numpy: whether numpy has it too, under the same name.
    """

    name: str
    session: str
    onnx: int
    in_numpy: bool = True


FLOATS = {
    kind.name: kind
    for kind in (
        FloatType("float32", "tensor(float)", TensorProto.FLOAT),
        FloatType("float16", "tensor(float16)", TensorProto.FLOAT16),
        FloatType("bfloat16", "tensor(bfloat16)", TensorProto.BFLOAT16, in_numpy=False),
    )
}
