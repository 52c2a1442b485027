"""What each ATen operation does to dimension labels: a row holds its rule and its sign."""

from __future__ import annotations

import torch

from meristem.structure.ops import contractions, reductions, views
from meristem.structure.tracer import Call, Operation, Rule, Sign


def _rows(rule: Rule, names: str, sign: Sign = "any") -> dict[str, Operation]:
    return dict.fromkeys(names.split(), Operation(rule, sign))


OPERATIONS: dict[str, Operation] = {
    **_rows(views.view, "view _unsafe_view reshape flatten", "kept"),
    **_rows(views.view, "_reshape_alias"),
    **_rows(views.permute, "permute transpose t", "kept"),
    **_rows(views.permute, "transpose_ t_ numpy_T"),
    **_rows(views.unsqueeze, "unsqueeze", "kept"),
    **_rows(views.unsqueeze, "unsqueeze_"),
    **_rows(views.squeeze, "squeeze", "kept"),
    **_rows(views.squeeze, "squeeze_"),
    **_rows(views.expand, "expand", "kept"),
    **_rows(views.repeat, "repeat"),
    **_rows(views.slice_, "slice", "kept"),
    **_rows(views.select, "select", "kept"),
    **_rows(views.select, "unbind"),
    **_rows(views.split, "split split_with_sizes chunk unsafe_split unsafe_chunk"),
    **_rows(views.glu, "glu"),
    **_rows(views.cat, "cat", "kept"),
    **_rows(views.stack, "stack"),
    **_rows(views.constant_pad, "constant_pad_nd"),
    **_rows(views.ordered, "roll flip sort topk cumsum cumprod cummax cummin"),
    **_rows(views.ordered, "logcumsumexp"),
    **_rows(views.index, "index"),
    **_rows(views.gather, "index_select gather"),
    **_rows(views.view, "view_copy"),
    **_rows(views.permute, "permute_copy transpose_copy t_copy"),
    **_rows(views.unsqueeze, "unsqueeze_copy"),
    **_rows(views.squeeze, "squeeze_copy"),
    **_rows(views.expand, "expand_copy"),
    **_rows(views.select, "unbind_copy"),
    **_rows(views.split, "split_with_sizes_copy"),
    **_rows(views.written_to, "slice_scatter select_scatter index_fill index_fill_"),
    **_rows(views.diagonal, "diagonal diagonal_copy"),
    **_rows(views.scatter, "scatter scatter_add scatter_reduce index_add index_copy"),
    **_rows(views.scatter, "scatter_ scatter_add_ index_add_ index_copy_"),
    **_rows(views.scatter, "scatter_reduce_ index_reduce index_reduce_"),
    **_rows(views.put, "index_put index_put_ _unsafe_index_put"),
    **_rows(views.from_channels, "pixel_shuffle col2im"),
    **_rows(views.into_channels, "pixel_unshuffle im2col"),
    **_rows(views.channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_rows(views.fourier, "_fft_r2c _fft_c2c _fft_c2r"),
    **_rows(views.as_complex, "view_as_complex"),
    **_rows(views.as_real, "view_as_real"),
    **_rows(views.restrided, "as_strided as_strided_"),
    **_rows(views.picked, "kthvalue mode"),
    **_rows(views.turned, "rot90"),
    **_rows(views.created, "new_zeros new_ones new_full new_empty new_empty_strided"),
    **_rows(views.pointwise, "relu relu_ sigmoid exp", "positive"),
    **_rows(views.pointwise, "add mul clone alias detach contiguous dropout", "kept"),
    **_rows(views.pointwise, "native_dropout", "kept"),
    **_rows(
        views.pointwise, "_to_copy lift_fresh lift_fresh_copy bernoulli bernoulli_"
    ),
    **_rows(views.pointwise, "copy_ fill_ zero_ tril triu empty_like zeros_like"),
    **_rows(views.pointwise, "ones_like full_like rand_like randn_like masked_fill"),
    **_rows(views.pointwise, "masked_fill_ floor_divide hardswish hardswish_ silu_"),
    **_rows(views.pointwise, "rrelu_with_noise uniform_ normal_ clamp clamp_"),
    **_rows(views.pointwise, "clamp_min clamp_max"),
    **_rows(views.spatial, "max_pool1d max_pool2d_with_indices avg_pool2d", "kept"),
    **_rows(views.spatial, "max_pool3d_with_indices _adaptive_avg_pool2d", "kept"),
    **_rows(views.spatial, "grid_sampler_2d grid_sampler_3d"),
    **_rows(views.pointwise, "log_sigmoid_forward native_dropout_backward rsub fill"),
    **_rows(views.pointwise, "_conj complex polar alias_copy exponential_ cauchy_"),
    **_rows(views.pointwise, "log_normal_ geometric_ normal isin bucketize"),
    **_rows(contractions.embedding, "embedding"),
    **_rows(contractions.bag, "_embedding_bag _embedding_bag_forward_only"),
    **_rows(contractions.distances, "_cdist_forward"),
    **_rows(contractions.matmul, "mm addmm bmm baddbmm mv dot vdot"),
    **_rows(contractions.bilinear, "_trilinear"),
    **_rows(contractions.grouped, "_grouped_mm"),
    **_rows(contractions.convolution, "convolution"),
    **_rows(reductions.layer_norm, "native_layer_norm"),
    **_rows(reductions.group_norm, "native_group_norm"),
    **_rows(reductions.weight_norm, "_weight_norm_interface"),
    **_rows(reductions.softmax, "_softmax _safe_softmax softmax", "positive"),
    **_rows(reductions.softmax, "_log_softmax"),
    **_rows(reductions.class_loss, "nll_loss_forward nll_loss2d_forward"),
    **_rows(reductions.reduce, "mean sum", "kept"),
    **_rows(reductions.reduce, "amax amin var std prod linalg_vector_norm norm"),
    **_rows(
        reductions.reduce, "logsumexp any all argmax argmin max min var_mean median"
    ),
    **_rows(reductions.reduce, "std_mean nansum aminmax count_nonzero nanmedian"),
    **_rows(reductions.loss, "mse_loss huber_loss smooth_l1_loss soft_margin_loss"),
    **_rows(reductions.loss, "binary_cross_entropy binary_cross_entropy_with_logits"),
    **_rows(reductions.prelu, "_prelu_kernel prelu"),
}
"""What is known of each operation by its name. A new one is one row."""

# Operations with one kernel per backend, by a part of their names.
_FAMILIES: tuple[tuple[str, Rule], ...] = (
    ("scaled_dot_product", contractions.attention),
    ("batch_norm", reductions.batch_norm),
)


def operation_of(call: Call) -> Operation | None:
    """The row for a call, or None where nothing is known of the operation."""
    if not call.inputs:
        return Operation(views.created)
    if call.name in OPERATIONS:
        return OPERATIONS[call.name]
    for part, rule in _FAMILIES:
        if part in call.name:
            return Operation(rule)
    is_spatial = any(part in call.name for part in ("pool", "upsample", "_pad"))
    if is_spatial and call.outputs[0].dim() >= 3:
        return Operation(views.spatial)
    if torch.Tag.pointwise in call.func.tags:
        return Operation(views.pointwise)
    return None
