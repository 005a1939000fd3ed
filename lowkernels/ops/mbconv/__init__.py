"""mbconv: the public functions. The operator itself is ``torch.ops.lowkernels.mbconv``."""

from __future__ import annotations

from torch import Tensor

from ..operator import Operator, PackedWeights
from . import contract, reference

OPERATOR = Operator(contract, reference)


def mbconv(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
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
    """Inverted residual block: 1x1 expansion, depthwise k x k, 1x1 projection, as one operator.

    Computes ``y = project(act(depthwise(act(expand(x)))))``, each convolution with its bias, then ``y + x`` if ``residual``.
    Memory layout is NHWC: a channels_last ``x`` is read as it is, any other is copied once. Biases may be None. All tensors share
    one dtype (float16, bfloat16, float32, or float64 on the reference) and one device.

    Source: Sandler et al., "MobileNetV2", arXiv 1801.04381, section 3.3.

    Args:
        x: (N, C_in, H, W).
        expand_weight: (E, C_in, 1, 1).
        expand_bias: (E,).
        dw_weight: (E, 1, k, k), k odd, at most 7.
        dw_bias: (E,).
        project_weight: (C_out, E, 1, 1).
        project_bias: (C_out,).
        act: after the expansion and after the depthwise convolution, one of :data:`ACTIVATIONS`.
        stride: of the depthwise convolution, 1 or 2.
        padding: of the depthwise convolution on all four sides, 0 to k // 2; it pads the activated expansion with zeros.
        residual: add x to the output, which must have its shape.
        packed: what :func:`pack_mbconv` made from these very weights; None lays them out on the spot.
        backend: name of the backend to use, or ``"auto"``; None asks ``lowkernels.use_backend``, then the environment.

    Returns:
        (N, C_out, H_out, W_out), channels_last.

    Raises:
        InputError: an argument is outside the contract above.
        BackendError: the backend asked for by name cannot serve the call.
    """
    tensors, packed_for = (None, None) if packed is None else (packed.tensors, packed.backend)
    out: Tensor = OPERATOR.overload(
        x,
        expand_weight,
        expand_bias,
        dw_weight,
        dw_bias,
        project_weight,
        project_bias,
        act,
        stride,
        padding,
        residual,
        tensors,
        packed_for,
        backend,
    )
    return out


def pack_mbconv(
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None = None,
    *,
    act: str = "hardswish",
    stride: int = 1,
    padding: int = 1,
    residual: bool = False,
    backend: str | None = None,
) -> PackedWeights:
    """Lay out the weights of :func:`mbconv` for one backend, once. Arguments are those of the calls to come.

    Args:
        backend: the backend to pack for; None lets the dispatcher choose by everything but the input.

    Raises:
        BackendError: ``backend`` is unknown or can never serve these weights.
    """
    return OPERATOR.pack(
        expand_weight,
        expand_bias,
        dw_weight,
        dw_bias,
        project_weight,
        project_bias,
        act,
        stride,
        padding,
        residual,
        backend=backend,
    )
