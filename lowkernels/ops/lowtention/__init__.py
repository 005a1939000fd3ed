"""lowtention: the public functions. The operator itself is ``torch.ops.lowkernels.lowtention``."""

from __future__ import annotations

from torch import Tensor

from ..operator import Operator, PackedWeights
from . import contract, reference

OPERATOR = Operator(contract, reference)


def lowtention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    *,
    stride: int = 1,
    residual: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """LowFormer's attention block at reduced resolution and half the channels, as one operator.

    Computes, with d = C_qkv / (3 num_heads): optional GroupNorm with one group; depthwise k x k convolution with padding k // 2
    and ``stride``; 1x1 convolution to q, k, v; softmax(q k^T / sqrt(d)) v over all positions; transposed convolution (k 3,
    padding 1 for stride 1; k 4, padding 1 for stride 2); crop to H x W; then ``+ x`` if ``residual``.
    Memory layout is NHWC: a channels_last ``x`` is read as it is, any other is copied once. Biases may be None. All tensors share
    one dtype (float16, bfloat16, float32, or float64 on the reference) and one device.

    Source: Nottebaum et al., "LowFormer", WACV 2025, arXiv 2409.03460, section 3.

    Args:
        x: (N, C, H, W).
        norm_weight: (C,), or None for a block without GroupNorm.
        norm_bias: (C,), or None together with norm_weight.
        eps: of the GroupNorm, positive.
        dw_weight: (C, 1, k, k), k odd, at most 7.
        dw_bias: (C,).
        qkv_weight: (C_qkv, C, 1, 1); head i owns channels [3 d i, 3 d (i + 1)): q, then k, then v.
        up_weight: (C_qkv / 3, C_out, 3, 3) for stride 1, (C_qkv / 3, C_out, 4, 4) for stride 2, as nn.ConvTranspose2d has it.
        up_bias: (C_out,).
        num_heads: divides C_qkv / 3.
        stride: 1 or 2.
        residual: add x to the output, which must have its shape.
        packed: what :func:`pack_lowtention` made from these very weights; None lays them out on the spot.
        backend: name of the backend to use, or ``"auto"``; None asks ``lowkernels.use_backend``, then the environment.

    Returns:
        (N, C_out, H, W), channels_last.

    Raises:
        InputError: an argument is outside the contract above.
        BackendError: the backend asked for by name cannot serve the call.
    """
    tensors, packed_for = (None, None) if packed is None else (packed.tensors, packed.backend)
    out: Tensor = OPERATOR.overload(
        x,
        norm_weight,
        norm_bias,
        eps,
        dw_weight,
        dw_bias,
        qkv_weight,
        up_weight,
        up_bias,
        num_heads,
        stride,
        residual,
        tensors,
        packed_for,
        backend,
    )
    return out


def pack_lowtention(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    *,
    stride: int = 1,
    residual: bool = False,
    backend: str | None = None,
) -> PackedWeights:
    """Lay out the weights of :func:`lowtention` for one backend, once. Arguments are those of the calls to come.

    Args:
        backend: the backend to pack for; None lets the dispatcher choose by everything but the input.

    Raises:
        BackendError: ``backend`` is unknown or can never serve these weights.
    """
    return OPERATOR.pack(
        norm_weight,
        norm_bias,
        eps,
        dw_weight,
        dw_bias,
        qkv_weight,
        up_weight,
        up_bias,
        num_heads,
        stride,
        residual,
        backend=backend,
    )
