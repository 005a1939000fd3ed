"""separable_conv: the public functions. The operator itself is ``torch.ops.lowkernels.separable_conv``."""

from __future__ import annotations

from torch import Tensor

from ..operator import Operator, PackedWeights
from . import contract, reference

OPERATOR = Operator(contract, reference)


def separable_conv(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_act: str,
    pw_weight: Tensor,
    pw_bias: Tensor | None = None,
    *,
    pw_act: str = "none",
    stride: int = 1,
    padding: int = 1,
    residual: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """Depthwise k x k convolution, then 1x1 convolution, each with bias and activation, as one operator.

    Computes ``y = pw_act(conv1x1(dw_act(depthwise(x) + dw_bias)) + pw_bias)``, then ``y + x`` if ``residual``.
    Memory layout is NHWC: a channels_last ``x`` is read as it is, any other is copied once. Biases may be None. All tensors share
    one dtype (float16, bfloat16, float32, or float64 on the reference) and one device.

    Source: Howard et al., "MobileNets", arXiv 1704.04861, section 3.1.

    Args:
        x: (N, C, H, W).
        dw_weight: (C, 1, k, k), k odd, at most 7.
        dw_bias: (C,).
        dw_act: one of :data:`ACTIVATIONS`.
        pw_weight: (C_out, C, 1, 1).
        pw_bias: (C_out,).
        pw_act: one of :data:`ACTIVATIONS`.
        stride: of the depthwise convolution, 1 or 2.
        padding: of the depthwise convolution on all four sides, 0 to k // 2.
        residual: add x to the output, which must have its shape.
        packed: what :func:`pack_separable_conv` made from these very weights; None lays them out on the spot.
        backend: name of the backend to use, or ``"auto"``; None asks ``lowkernels.use_backend``, then the environment.

    Returns:
        (N, C_out, H_out, W_out), channels_last.

    Raises:
        InputError: an argument is outside the contract above.
        BackendError: the backend asked for by name cannot serve the call.
    """
    tensors, packed_for = (None, None) if packed is None else (packed.tensors, packed.backend)
    out: Tensor = OPERATOR.overload(
        x, dw_weight, dw_bias, dw_act, pw_weight, pw_bias, pw_act, stride, padding, residual, tensors, packed_for, backend
    )
    return out


def pack_separable_conv(
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_act: str,
    pw_weight: Tensor,
    pw_bias: Tensor | None = None,
    *,
    pw_act: str = "none",
    stride: int = 1,
    padding: int = 1,
    residual: bool = False,
    backend: str | None = None,
) -> PackedWeights:
    """Lay out the weights of :func:`separable_conv` for one backend, once. Arguments are those of the calls to come.

    Args:
        backend: the backend to pack for; None lets the dispatcher choose by everything but the input.

    Raises:
        BackendError: ``backend`` is unknown or can never serve these weights.
    """
    return OPERATOR.pack(dw_weight, dw_bias, dw_act, pw_weight, pw_bias, pw_act, stride, padding, residual, backend=backend)
