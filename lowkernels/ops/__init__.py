"""The operators: one folder each, holding the public functions (``__init__.py``), the contract (``contract.py``: schema, checks,
output shape; torch only), the eager reference (``reference.py``) and one file per further backend.

To add an operator: add its folder and name it here.
"""

from __future__ import annotations

from typing import Any

from ..dispatch import Choice
from ..errors import InputError
from . import conv_act as _conv_act
from . import fused_mbconv as _fused_mbconv
from . import gn_mlp as _gn_mlp
from . import lowtention as _lowtention
from . import mbconv as _mbconv
from . import separable_conv as _separable_conv
from .activations import ACTIVATIONS
from .operator import Operator, PackedWeights

OPERATORS: dict[str, Operator] = {
    folder.OPERATOR.name: folder.OPERATOR for folder in (_conv_act, _separable_conv, _mbconv, _fused_mbconv, _lowtention, _gn_mlp)
}

conv_act, pack_conv_act = _conv_act.conv_act, _conv_act.pack_conv_act
separable_conv, pack_separable_conv = _separable_conv.separable_conv, _separable_conv.pack_separable_conv
mbconv, pack_mbconv = _mbconv.mbconv, _mbconv.pack_mbconv
fused_mbconv, pack_fused_mbconv = _fused_mbconv.fused_mbconv, _fused_mbconv.pack_fused_mbconv
lowtention, pack_lowtention = _lowtention.lowtention, _lowtention.pack_lowtention
gn_mlp, pack_gn_mlp = _gn_mlp.gn_mlp, _gn_mlp.pack_gn_mlp


def explain(operator: str, *args: Any, backend: str | None = None) -> Choice:
    """Which backend would serve a call, and why; nothing is run.

    Args:
        operator: the operator's name.
        args: its arguments in the order of its function, trailing ones with defaults may be left out.
        backend: as in the call itself.

    Returns:
        The choice; ``print()`` it for a sentence that also says why preferred backends refused.

    Raises:
        InputError: there is no such operator, or the arguments are outside its contract.
        BackendError: the backend asked for by name cannot serve the call.
    """
    if operator not in OPERATORS:
        raise InputError(f"lowkernels.explain: argument operator: is {operator!r}; allowed are {', '.join(OPERATORS)}")
    return OPERATORS[operator].explain(*args, backend=backend)


__all__ = [
    "ACTIVATIONS",
    "OPERATORS",
    "Operator",
    "PackedWeights",
    "conv_act",
    "explain",
    "fused_mbconv",
    "gn_mlp",
    "lowtention",
    "mbconv",
    "pack_conv_act",
    "pack_fused_mbconv",
    "pack_gn_mlp",
    "pack_lowtention",
    "pack_mbconv",
    "pack_separable_conv",
    "separable_conv",
]
