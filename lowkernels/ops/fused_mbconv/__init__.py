"""fused_mbconv: the public functions. The operator itself is ``torch.ops.lowkernels.fused_mbconv``."""

from __future__ import annotations

from torch import Tensor

from ..operator import Operator, PackedWeights
from . import contract, reference

OPERATOR = Operator(contract, reference)


def fused_mbconv(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None = None,
    *,
    act: str = "hardswish",
    stride: int = 1,
    padding: int = 1,
    residual: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """Fused inverted residual block: dense k x k expansion with activation, 1x1 projection, as one operator.

    Computes ``y = project(act(conv2d(x)))``, each convolution with its bias, then ``y + x`` if ``residual``.
    Memory layout is NHWC: a channels_last ``x`` is read as it is, any other is copied once. Biases may be None. All tensors share
    one dtype (float16, bfloat16, float32, or float64 on the reference) and one device.

    Source: Tan and Le, "EfficientNetV2", arXiv 2104.00298, section 3.2.

    Args:
        x: (N, C_in, H, W).
        conv_weight: (E, C_in, k, k), k odd, at most 7.
        conv_bias: (E,).
        project_weight: (C_out, E, 1, 1).
        project_bias: (C_out,).
        act: after the k x k convolution, one of :data:`ACTIVATIONS`.
        stride: of the k x k convolution, 1 or 2.
        padding: of the k x k convolution on all four sides, 0 to k // 2.
        residual: add x to the output, which must have its shape.
        packed: what :func:`pack_fused_mbconv` made from these very weights; None lays them out on the spot.
        backend: name of the backend to use, or ``"auto"``; None asks ``lowkernels.use_backend``, then the environment.

    Returns:
        (N, C_out, H_out, W_out), channels_last.

    Raises:
        InputError: an argument is outside the contract above.
        BackendError: the backend asked for by name cannot serve the call.
    """
    tensors, packed_for = (None, None) if packed is None else (packed.tensors, packed.backend)
    out: Tensor = OPERATOR.overload(
        x, conv_weight, conv_bias, project_weight, project_bias, act, stride, padding, residual, tensors, packed_for, backend
    )
    return out


def pack_fused_mbconv(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None = None,
    *,
    act: str = "hardswish",
    stride: int = 1,
    padding: int = 1,
    residual: bool = False,
    backend: str | None = None,
) -> PackedWeights:
    """Lay out the weights of :func:`fused_mbconv` for one backend, once. Arguments are those of the calls to come.

    Args:
        backend: the backend to pack for; None lets the dispatcher choose by everything but the input.

    Raises:
        BackendError: ``backend`` is unknown or can never serve these weights.
    """
    return OPERATOR.pack(conv_weight, conv_bias, project_weight, project_bias, act, stride, padding, residual, backend=backend)
