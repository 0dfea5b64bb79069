"""What a block notes on its nodes: every key of `node.meta` that passes, lowering and validation write or read.

The values of a block are typed by SPEC; the other keys tie nodes to the linears, convolutions and mixtures that they
came from, so that reports and kernels go by those names. Whatever is noted on a node is kept when the block is written
and read back (`calibrate.shards`): numbers, text, dtypes, nodes, and tuples and dicts of them, under these keys or any
other. Before a graph is cut into blocks its nodes have `torch.export`'s keys instead.
"""

from enum import StrEnum


class Meta(StrEnum):
    """A key of `node.meta`, and what is there."""

    SPEC = "spec"
    """TensorSpec of the value; a tuple of them where there are several, None where it is no tensor."""

    MODULE_PATH = "module_path"
    """Path of the module whose code made the node; empty for the model itself."""

    LINE = "line"
    """On a node of known origin: " at file:line: code", the line of the user's code that made it."""

    LINEAR = "linear"
    """On the product of a quantized linear: the linear's name. A plane or a branch beside it has a name of its own."""

    RESULT_OF = "result_of"
    """On the node that has a quantized linear's or convolution's whole result: its name."""

    USE = "use"
    """On a linear whose name another call of the same module has already: which call it is, from 2 on."""

    NAMED = "named"
    """On a linear whose weight is one of several of its module: its name."""

    GATES = "gates"
    """On the steps of a recurrent layer: the name of the linear that multiplies its input."""

    READ_ELSEWHERE = "read_elsewhere"
    """On a linear whose weight linears of other blocks read too: True."""

    PLANE_OF = "plane_of"
    """On the product of a second plane of codes: the linear whose result it is added to."""

    BRANCH_OF = "branch_of"
    """On a product of a low-rank or outlier branch: the linear whose result it is added to."""

    CONVOLUTION = "convolution"
    """On a quantized convolution: its name."""

    WITHOUT_OUTLIERS = "without_outliers"
    """On a value that is its first argument but for some channels: True."""

    REORDERED = "reordered"
    """On a value that is its first argument with its features in another order, or times a factor each: True."""

    ORDERS = "orders"
    """Beside RESULT_OF, by name of the linear: in which order what it reads, and what it makes, has the features of the
    float model; two texts as `artifact.feature_order` writes them, "" for the order of that model."""

    CACHE_SCALES = "cache_scales"
    """On an attention with a cache: the scales of keys and of values that the checkpoint has, two numbers."""

    COARSE = "coarse"
    """On a tensor of scales that the file keeps in 8 bits, see `quant.coarse_scales`: True."""

    PLANES = "planes"
    """On a tensor of codes: the bits of a code in the file, fewer than kernels read, see `quant.planes`; a tuple where
    each group of input features has its own."""

    ODD = "odd"
    """Beside PLANES: codes of up to so many bits are odd numbers, see `quant.formats.midrise`."""

    PADDED = "padded"
    """On a value that is its first argument with zeros behind its features: True."""

    COLUMNS = "columns"
    """On the product of merged linears: (start, stop) of each in the value, by its name."""

    EXPERTS = "experts"
    """On a mixture of experts in one node: `lower.fuse_moe.FusedExperts`."""

    KEEP_FLOAT32 = "keep_float32"
    """On a node that computes in float32 whatever the dtype of the file: True."""


BESIDE = frozenset({Meta.PLANE_OF, Meta.BRANCH_OF})
"""Keys of products that are added to a linear's result and are not the linear itself."""
