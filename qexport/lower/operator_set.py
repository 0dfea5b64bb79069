"""Which operators a file is made of: ONNX Runtime's own beside those of ONNX, or those of ONNX alone."""

from dataclasses import dataclass

from ..errors import InputError

FORMS = ("native", "qdq")
OPSET = 23  # Attention, RMSNormalization and RotaryEmbedding appeared here
OPSETS = range(21, 26)  # 4-bit codes and blocks appeared in the first; 2-bit codes in the last


@dataclass(frozen=True)
class OperatorSet:
    """What nodes of a file may be.

    Attributes:
        opset: of ONNX.
        contrib: whether operators of ONNX Runtime's own are among them. Without them weights are DequantizeLinear in
            front of plain products, for any reader of ONNX.
    """

    opset: int = OPSET
    contrib: bool = True

    @property
    def has_transformer_operators(self) -> bool:
        """Whether there are Attention, RMSNormalization and RotaryEmbedding."""
        return self.opset >= OPSET

    @property
    def ir_version(self) -> int:
        """Of the file format that came with the opset, and 11 at least."""
        return max(11, min(self.opset - 12, 13))


NATIVE = OperatorSet()


def operators_of(form: str, opset: int | None) -> OperatorSet:
    """What a user asks for.

    Args:
        form: one of `FORMS`; opset: None takes the one that native files have.

    Raises:
        InputError: there is no such form, or no such opset in it.
    """
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}", place="form", remedy=f"Choose {' or '.join(FORMS)}")
    if opset is not None and form == "native":
        raise InputError("the native form has one opset", place="opset", remedy="Leave it out, or take form qdq")
    if opset is not None and opset not in OPSETS:
        raise InputError(
            f"{opset} is not one of {OPSETS[0]} to {OPSETS[-1]}, which have blocks of 4-bit codes and which ONNX "
            "Runtime reads", place="opset", remedy=f"Choose one of them, or leave it out for {OPSET}",
        )  # fmt: skip
    return OperatorSet(opset or OPSET, contrib=form == "native")
