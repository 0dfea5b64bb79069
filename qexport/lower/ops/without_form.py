"""Operators that cannot be translated, and why."""

import torch

from ..registry import has_no_form

aten, prims = torch.ops.aten, torch.ops.prims

has_no_form(
    "it draws random numbers, and a file could not be compared with the model",
    aten.rand, aten.randn, aten.randint, aten.randperm, aten.rand_like, aten.randn_like, aten.randint_like,
    aten.bernoulli, aten.multinomial, aten.normal, aten.normal_functional, aten.uniform, aten.exponential,
    aten.fractional_max_pool2d, aten.fractional_max_pool3d,
)  # fmt: skip
has_no_form(
    "the shape of its result depends on values, and a graph has to know shapes",
    aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.unique_consecutive,
    aten.repeat_interleave.Tensor,
)  # fmt: skip
has_no_form("it takes a number out of a tensor", aten._local_scalar_dense, aten.item)
has_no_form(
    "it is only for training",
    aten._adaptive_avg_pool2d_backward, aten._adaptive_avg_pool3d_backward, aten.avg_pool2d_backward,
    aten.convolution_backward, aten.embedding_dense_backward, aten.max_pool2d_with_indices_backward,
    aten.native_group_norm_backward, aten.native_layer_norm_backward,
)  # fmt: skip
has_no_form(
    "a graph has no memory that strides and offsets could count in",
    aten.sym_stride,
    aten.sym_storage_offset,
    aten.sym_is_contiguous,
)
has_no_form(
    "neither ONNX nor ONNX Runtime has this function",
    aten.lgamma, aten.digamma, aten.polygamma, aten.erfinv, aten.i0, aten.igamma, aten.igammac, aten.nextafter,
    aten.special_i0e, aten.special_i1, aten.special_i1e, aten.special_ndtri, aten.special_zeta, prims.lgamma,
    prims.digamma, prims.erf_inv, prims.bessel_i0, prims.bessel_i0e, prims.bessel_i1, prims.bessel_i1e,
    prims.ndtri, prims.zeta, prims.nextafter,
)  # fmt: skip
has_no_form(
    "ONNX Runtime has no decomposition of matrices",
    aten.linalg_inv_ex, aten._linalg_det, aten._linalg_slogdet, aten.linalg_lu_factor_ex, aten.linalg_lu,
    aten.linalg_cholesky_ex, aten.linalg_qr, aten._linalg_svd, aten.linalg_eig, aten._linalg_eigh,
    aten._linalg_solve_ex, aten.linalg_solve_triangular, aten.triangular_solve, aten.linalg_ldl_factor_ex,
    aten.linalg_lstsq,
)  # fmt: skip
has_no_form(
    "ONNX Runtime has no kernel for it",
    aten.cummin, aten.cummax, aten.mode, aten.histc, aten.bincount, aten.histogram,
)  # fmt: skip
