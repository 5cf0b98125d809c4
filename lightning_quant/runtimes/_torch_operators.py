"""The closed list of operators that programs of the runtime `torch` may call.

A program comes from a file, so what it can call decides what opening one can do. All of these compute values from
values: none opens a file, resizes or writes what it is given, hands out memory that nobody filled, or evaluates text.
The list has PyTorch's Core ATen operators (`torch.Tag.core`, 2.13) and what `torch`, `torch.nn.functional`,
`torch.special`, `torch.fft` and `torch.linalg` call beside them, without backward passes and what is for other devices
or sparse tensors.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import Target

_ATEN = frozenset({
    "__and__", "__lshift__", "__or__", "__rshift__", "__xor__", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "_cast_Float", "_cdist_forward", "_conj", "_convolution", "_ctc_loss", "_embedding_bag",
    "_embedding_bag_forward_only", "_euclidean_dist", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_fused_rms_norm", "_int_mm",
    "_linalg_det", "_linalg_eigh", "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd", "_local_scalar_dense",
    "_log_softmax", "_logcumsumexp", "_make_per_channel_quantized_tensor", "_make_per_tensor_quantized_tensor",
    "_masked_softmax", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_native_multi_head_attention", "_neg_view", "_pack_padded_sequence", "_pad_packed_sequence", "_pdist_forward",
    "_prelu_kernel", "_reshape_alias", "_safe_softmax", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention_for_cpu", "_shape_as_tensor", "_softmax", "_stack", "_to_copy",
    "_transformer_encoder_layer_fwd", "_trilinear", "_unique", "_unique2", "_unsafe_view", "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_weight_norm", "_weight_norm_interface", "abs", "absolute", "acos", "acosh", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "add", "addbmm", "addcdiv", "addcmul", "addmm", "addmv", "addr", "adjoint", "affine_grid_generator", "alias",
    "alias_copy", "all", "alpha_dropout", "amax", "amin", "aminmax", "angle", "any", "arange", "arccos", "arccosh",
    "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "argmax", "argmin", "argsort", "argwhere", "as_strided",
    "as_strided_copy", "as_strided_scatter", "asin", "asinh", "atan", "atan2", "atanh", "atleast_1d", "atleast_2d",
    "atleast_3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "baddbmm", "bartlett_window", "batch_norm", "bernoulli",
    "bilinear", "binary_cross_entropy", "binary_cross_entropy_with_logits", "bincount", "bitwise_and",
    "bitwise_left_shift", "bitwise_not", "bitwise_or", "bitwise_right_shift", "bitwise_xor", "blackman_window",
    "block_diag", "bmm", "broadcast_tensors", "broadcast_to", "bucketize", "cartesian_prod", "cat", "cdist", "ceil",
    "celu", "chain_matmul", "channel_shuffle", "cholesky", "cholesky_inverse", "cholesky_solve", "chunk", "clamp",
    "clamp_max", "clamp_min", "clip", "clone", "col2im", "column_stack", "combinations", "complex", "concat",
    "concatenate", "conj", "conj_physical", "constant_pad_nd", "contiguous", "conv1d", "conv2d", "conv3d", "conv_tbc",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "copy", "copysign", "corrcoef", "cos",
    "cosh", "cosine_embedding_loss", "cosine_similarity", "count_nonzero", "cov", "cross", "cross_entropy_loss",
    "ctc_loss", "cummax", "cummin", "cumprod", "cumsum", "cumulative_trapezoid", "deg2rad", "dequantize", "det",
    "detach", "detach_copy", "diag", "diag_embed", "diagflat", "diagonal", "diagonal_copy", "diagonal_scatter", "diff",
    "digamma", "dist", "div", "divide", "dot", "dropout", "dsplit", "dstack", "einsum", "elu", "embedding",
    "embedding_bag", "eq", "erf", "erfc", "erfinv", "exp", "exp2", "expand", "expand_as", "expand_copy", "expm1",
    "exponential", "eye", "fake_quantize_per_channel_affine", "fake_quantize_per_channel_affine_cachemask",
    "fake_quantize_per_tensor_affine", "fake_quantize_per_tensor_affine_cachemask", "feature_alpha_dropout",
    "feature_dropout", "fft_fft", "fft_fft2", "fft_fftfreq", "fft_fftn", "fft_fftshift", "fft_hfft", "fft_hfft2",
    "fft_hfftn", "fft_ifft", "fft_ifft2", "fft_ifftn", "fft_ifftshift", "fft_ihfft", "fft_ihfft2", "fft_ihfftn",
    "fft_irfft", "fft_irfft2", "fft_irfftn", "fft_rfft", "fft_rfft2", "fft_rfftfreq", "fft_rfftn", "fill", "fix",
    "flatten", "flip", "fliplr", "flipud", "float_power", "floor", "floor_divide", "fmax", "fmin", "fmod", "frac",
    "fractional_max_pool2d", "fractional_max_pool3d", "frexp", "frobenius_norm", "full", "full_like", "gather", "gcd",
    "ge", "gelu", "ger", "glu", "gradient", "greater", "greater_equal", "grid_sampler", "grid_sampler_2d",
    "grid_sampler_3d", "group_norm", "gru", "gru_cell", "gt", "hamming_window", "hann_window", "hardshrink",
    "hardsigmoid", "hardswish", "hardtanh", "heaviside", "hinge_embedding_loss", "histc", "hsplit", "hstack",
    "huber_loss", "hypot", "i0", "igamma", "igammac", "im2col", "imag", "index", "index_add", "index_copy",
    "index_fill", "index_put", "index_reduce", "index_select", "inner", "instance_norm", "inverse", "isclose",
    "isfinite", "isin", "isinf", "isnan", "isneginf", "isposinf", "isreal", "istft", "item", "kaiser_window", "kl_div",
    "kron", "kthvalue", "l1_loss", "layer_norm", "lcm", "ldexp", "le", "leaky_relu", "lerp", "less", "less_equal",
    "lgamma", "lift_fresh_copy", "linalg_cholesky", "linalg_cholesky_ex", "linalg_cond", "linalg_cross", "linalg_det",
    "linalg_diagonal", "linalg_eig", "linalg_eigh", "linalg_eigvals", "linalg_eigvalsh", "linalg_householder_product",
    "linalg_inv", "linalg_inv_ex", "linalg_lstsq", "linalg_lu", "linalg_lu_factor", "linalg_lu_factor_ex",
    "linalg_lu_solve", "linalg_matmul", "linalg_matrix_exp", "linalg_matrix_norm", "linalg_matrix_power",
    "linalg_matrix_rank", "linalg_multi_dot", "linalg_norm", "linalg_pinv", "linalg_qr", "linalg_slogdet",
    "linalg_solve", "linalg_solve_ex", "linalg_solve_triangular", "linalg_svd", "linalg_svdvals", "linalg_tensorinv",
    "linalg_tensorsolve", "linalg_vander", "linalg_vecdot", "linalg_vector_norm", "linear", "linspace", "log", "log10",
    "log1p", "log2", "log_sigmoid", "log_sigmoid_forward", "log_softmax", "logaddexp", "logaddexp2", "logcumsumexp",
    "logdet", "logical_and", "logical_not", "logical_or", "logical_xor", "logit", "logspace", "logsumexp", "lstm",
    "lstm_cell", "lt", "lu_solve", "lu_unpack", "mH", "mT", "margin_ranking_loss", "masked_fill", "masked_scatter",
    "masked_select", "matmul", "matrix_H", "matrix_exp", "matrix_power", "max", "max_pool1d",
    "max_pool1d_with_indices", "max_pool2d", "max_pool2d_with_indices", "max_pool3d", "max_pool3d_with_indices",
    "max_unpool2d", "max_unpool3d", "maximum", "mean", "median", "meshgrid", "min", "minimum", "mish", "mm", "mode",
    "moveaxis", "movedim", "mse_loss", "msort", "mul", "multi_margin_loss", "multilabel_margin_loss",
    "multilabel_margin_loss_forward", "multinomial", "multiply", "mv", "mvlgamma", "nan_to_num", "nanmean",
    "nanmedian", "nanquantile", "nansum", "narrow", "narrow_copy", "native_batch_norm", "native_channel_shuffle",
    "native_dropout", "native_group_norm", "native_layer_norm", "ne", "neg", "negative", "new_full", "new_ones",
    "new_zeros", "nextafter", "nll_loss", "nll_loss2d", "nll_loss2d_forward", "nll_loss_forward", "nll_loss_nd",
    "nonzero", "norm", "normal", "normal_functional", "not_equal", "nuclear_norm", "numpy_T", "one_hot", "ones",
    "ones_like", "outer", "pad", "pairwise_distance", "pdist", "permute", "permute_copy", "pinverse", "pixel_shuffle",
    "pixel_unshuffle", "poisson", "poisson_nll_loss", "polar", "polygamma", "positive", "pow", "prelu", "prod", "put",
    "qr", "quantile", "quantize_per_channel", "quantize_per_tensor", "rad2deg", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm", "range", "ravel", "real", "reciprocal", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "relu", "relu6", "remainder", "renorm", "repeat", "repeat_interleave",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "reshape", "reshape_as", "resolve_conj",
    "resolve_neg", "rms_norm", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell", "roll", "rot90", "round",
    "row_stack", "rrelu", "rsqrt", "rsub", "scalar_tensor", "scaled_dot_product_attention", "scatter", "scatter_add",
    "scatter_reduce", "searchsorted", "select", "select_copy", "select_scatter", "selu", "sgn", "sigmoid", "sign",
    "signbit", "silu", "sin", "sinc", "sinh", "slice", "slice_copy", "slice_scatter", "slogdet", "slow_conv3d",
    "smooth_l1_loss", "soft_margin_loss", "softmax", "softplus", "softshrink", "sort", "special_airy_ai",
    "special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1",
    "special_chebyshev_polynomial_t", "special_chebyshev_polynomial_u", "special_chebyshev_polynomial_v",
    "special_chebyshev_polynomial_w", "special_digamma", "special_entr", "special_erf", "special_erfc",
    "special_erfcx", "special_erfinv", "special_exp2", "special_expit", "special_expm1", "special_gammainc",
    "special_gammaincc", "special_gammaln", "special_hermite_polynomial_h", "special_hermite_polynomial_he",
    "special_i0", "special_i0e", "special_i1", "special_i1e", "special_laguerre_polynomial_l",
    "special_legendre_polynomial_p", "special_log1p", "special_log_ndtr", "special_log_softmax", "special_logit",
    "special_logsumexp", "special_modified_bessel_i0", "special_modified_bessel_i1", "special_modified_bessel_k0",
    "special_modified_bessel_k1", "special_multigammaln", "special_ndtr", "special_ndtri", "special_polygamma",
    "special_psi", "special_round", "special_scaled_modified_bessel_k0", "special_scaled_modified_bessel_k1",
    "special_shifted_chebyshev_polynomial_t", "special_shifted_chebyshev_polynomial_u",
    "special_shifted_chebyshev_polynomial_v", "special_shifted_chebyshev_polynomial_w", "special_sinc",
    "special_softmax", "special_spherical_bessel_j0", "special_xlog1py", "special_xlogy", "special_zeta", "split",
    "split_copy", "split_with_sizes", "split_with_sizes_copy", "sqrt", "square", "squeeze", "squeeze_copy", "stack",
    "std", "std_mean", "stft", "sub", "subtract", "sum", "sum_to_size", "svd", "swapaxes", "swapdims", "sym_numel",
    "sym_size", "t", "t_copy", "take", "take_along_dim", "tan", "tanh", "tensor_split", "tensordot", "thnn_conv2d",
    "threshold", "tile", "to", "topk", "trace", "transpose", "transpose_copy", "trapezoid", "trapz",
    "triangular_solve", "tril", "tril_indices", "triplet_margin_loss", "triu", "triu_indices", "true_divide", "trunc",
    "type_as", "unbind", "unbind_copy", "unflatten", "unfold", "unfold_copy", "uniform", "unique_consecutive",
    "unique_dim", "unique_dim_consecutive", "unsafe_chunk", "unsafe_split", "unsqueeze", "unsqueeze_copy",
    "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_trilinear3d", "vander", "var", "var_mean", "vdot", "view", "view_as",
    "view_as_complex", "view_as_complex_copy", "view_as_real", "view_as_real_copy", "view_copy", "vsplit", "vstack",
    "where", "xlogy", "zero", "zeros", "zeros_like",
})  # fmt: skip
# Kernels of tensors that PyTorch itself quantizes.
_QUANTIZED = frozenset({
    "add.default", "cat.default", "conv1d.default", "conv1d_prepack.default", "conv2d.new", "conv2d_prepack.default",
    "leaky_relu.default", "linear.default", "linear_prepack.default", "mul.default",
})  # fmt: skip
# Those of this package, `lightning_quant.layers`.
_OURS = frozenset({
    "grouped_product.default", "linear_dynamic.default", "linear_weight_only.default", "recurrent.default",
})  # fmt: skip
# Arithmetic on sizes: Python's own functions, on numbers alone.
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")},
}
_CALLS = {function: name for name, function in _ARITHMETIC.items()} | {operator.getitem: "operator.getitem"}


def name_of(target: Target) -> str | None:
    """Return what programs call an operator; None when it is not in the list."""
    if not isinstance(target, torch._ops.OpOverload):
        return _CALLS.get(target)  # type: ignore[arg-type]
    name = f"{target.namespace}.{target.name().rpartition('::')[2].partition('.')[0]}.{target._overloadname}"
    return name if _is_listed(name) and not target._schema.is_mutable else None


def operator_of(call: str) -> Callable[..., Any]:
    """Return the operator of a name.

    Raises:
        ValueError: it is not in the list, or this PyTorch does not have it.
    """
    if call == "operator.getitem":
        return _item
    if call in _ARITHMETIC:
        return functools.partial(_on_numbers, _ARITHMETIC[call])
    if not _is_listed(call):
        raise ValueError(f"{call!r:.80} is no operator of a program")
    namespace, name, overload = call.split(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    overloads = packet.overloads() if packet is not None else ()
    operator = getattr(packet, overload, None) if overload in overloads else None
    if operator is None or operator._schema.is_mutable:
        raise ValueError(f"{call!r:.80} is no operator of PyTorch {torch.__version__}")
    return operator


def _is_listed(call: str) -> bool:
    namespace, _, rest = call.partition(".")
    if namespace == "aten":
        return rest.partition(".")[0] in _ATEN and rest.count(".") == 1
    return rest in {"quantized": _QUANTIZED, "lightning_quant": _OURS}.get(namespace, ())


def _on_numbers(function: Callable[..., Any], *values: Any) -> Any:
    """Compute with numbers, which text and lists are not: Python would repeat those, and fill templates."""
    if not all(isinstance(value, bool | int | float) for value in values):
        raise TypeError(f"{values!r:.80} are no numbers")
    result = function(*values)
    if isinstance(result, int) and abs(result) >= 2**63:
        raise ValueError(f"a size has more than 63 bits after {function.__name__}")
    return result


def _item(values: Any, index: Any) -> Any:
    if not isinstance(values, list | tuple) or not isinstance(index, int):
        raise TypeError(f"{index!r:.80} is no place in a result")
    return values[index]
