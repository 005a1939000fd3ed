"""gn_mlp: the public functions. The operator itself is ``torch.ops.lowkernels.gn_mlp``."""

from __future__ import annotations

from torch import Tensor

from ..operator import Operator, PackedWeights
from . import contract, reference

OPERATOR = Operator(contract, reference)


def gn_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None = None,
    *,
    act: str = "gelu",
    residual: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm with one group, 1x1 expansion, activation, 1x1 projection, as one operator.

    Computes ``y = fc2(act(fc1(group_norm(x))))``, then ``y + x`` if ``residual``.
    Memory layout is NHWC: a channels_last ``x`` is read as it is, any other is copied once. Biases may be None. All tensors share
    one dtype (float16, bfloat16, float32, or float64 on the reference) and one device.

    Source: Nottebaum et al., "LowFormer", WACV 2025, arXiv 2409.03460, section 3.

    Args:
        x: (N, C, H, W); statistics are over C, H and W of one image.
        norm_weight: (C,).
        norm_bias: (C,).
        eps: of the GroupNorm, positive.
        fc1_weight: (E, C, 1, 1).
        fc1_bias: (E,).
        fc2_weight: (C_out, E, 1, 1).
        fc2_bias: (C_out,).
        act: after fc1, one of :data:`ACTIVATIONS`.
        residual: add x to the output, which must have its shape.
        packed: what :func:`pack_gn_mlp` made from these very weights; None lays them out on the spot.
        backend: name of the backend to use, or ``"auto"``; None asks ``lowkernels.use_backend``, then the environment.

    Returns:
        (N, C_out, H, W), channels_last.

    Raises:
        InputError: an argument is outside the contract above.
        BackendError: the backend asked for by name cannot serve the call.
    """
    tensors, packed_for = (None, None) if packed is None else (packed.tensors, packed.backend)
    out: Tensor = OPERATOR.overload(
        x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, residual, tensors, packed_for, backend
    )
    return out


def pack_gn_mlp(
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None = None,
    *,
    act: str = "gelu",
    residual: bool = False,
    backend: str | None = None,
) -> PackedWeights:
    """Lay out the weights of :func:`gn_mlp` for one backend, once. Arguments are those of the calls to come.

    Args:
        backend: the backend to pack for; None lets the dispatcher choose by everything but the input.

    Raises:
        BackendError: ``backend`` is unknown or can never serve these weights.
    """
    return OPERATOR.pack(norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, residual, backend=backend)
