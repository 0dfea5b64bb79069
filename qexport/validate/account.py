"""What an export did to the weights, by its own account."""

from pathlib import Path

from ..artifact.files import read_json
from ..errors import InputError
from ..passes.activations import QuantizeActivations
from ..passes.convolutions import QuantizeConvolutions
from ..passes.embedding import QuantizeEmbedding, ShareEmbedding
from ..passes.lowrank import LoRC
from ..passes.outliers import SeparateOutliers
from ..passes.weights import GPTQ, HalfQuadratic, RoundToNearest
from ..passes.zq_global import ZQGlobal
from ..passes.zq_local import ZQLocal
from .record import REPORT_FILE

# Passes that leave everything but the linears' weights and inputs as it was in the float model.
_QUANTIZERS = {
    step.__name__
    for step in (
        QuantizeEmbedding,
        ShareEmbedding,
        RoundToNearest,
        HalfQuadratic,
        GPTQ,
        ZQLocal,
        ZQGlobal,
        LoRC,
        SeparateOutliers,
        QuantizeActivations,
        QuantizeConvolutions,
    )  # fmt: skip
}


def transforms(folder: Path) -> bool:
    """Whether any pass but the quantizers changed the weights, by the account of the export; unknown counts as yes."""
    path = folder / REPORT_FILE
    try:
        blocks = read_json(path)["export"]["blocks"]
        return bool({name for block in blocks for name in block["changed"]} - _QUANTIZERS)
    except (InputError, KeyError, TypeError):
        return True
