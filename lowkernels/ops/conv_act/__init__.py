"""conv_act: the public functions. The operator itself is ``torch.ops.lowkernels.conv_act``."""

from __future__ import annotations

from torch import Tensor

from ..operator import Operator, PackedWeights
from . import contract, reference

OPERATOR = Operator(contract, reference)


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: str = "none",
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
    pool: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """Dense k x k convolution, bias, activation, optional residual and optional global average pool, as one operator.

    Computes ``y = act(conv2d(x, weight) + bias)``, then ``y + residual`` if given, then the mean over H and W if ``pool``.
    Memory layout is NHWC: a channels_last ``x`` is read as it is, any other is copied once. Biases may be None. All tensors share
    one dtype (float16, bfloat16, float32, or float64 on the reference) and one device.

    Args:
        x: (N, C_in, H, W), any C_in.
        weight: (C_out, C_in, k, k), k odd, at most 7.
        bias: (C_out,).
        act: one of :data:`ACTIVATIONS`.
        stride: 1 or 2.
        padding: on all four sides, 0 to k // 2.
        residual: added after the activation; the output's shape before pooling.
        pool: average over H and W.
        packed: what :func:`pack_conv_act` made from these very weights; None lays them out on the spot.
        backend: name of the backend to use, or ``"auto"``; None asks ``lowkernels.use_backend``, then the environment.

    Returns:
        (N, C_out, H_out, W_out) with H_out = (H + 2 padding - k) // stride + 1, channels_last; (N, C_out) if ``pool``.

    Raises:
        InputError: an argument is outside the contract above.
        BackendError: the backend asked for by name cannot serve the call.
    """
    tensors, packed_for = (None, None) if packed is None else (packed.tensors, packed.backend)
    out: Tensor = OPERATOR.overload(x, weight, bias, act, stride, padding, residual, pool, tensors, packed_for, backend)
    return out


def pack_conv_act(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: str = "none",
    stride: int = 1,
    padding: int = 0,
    pool: bool = False,
    backend: str | None = None,
) -> PackedWeights:
    """Lay out the weights of :func:`conv_act` for one backend, once. Arguments are those of the calls to come.

    Args:
        backend: the backend to pack for; None lets the dispatcher choose by everything but the input.

    Raises:
        BackendError: ``backend`` is unknown or can never serve these weights.
    """
    return OPERATOR.pack(weight, bias, act, stride, padding, pool, backend=backend)
