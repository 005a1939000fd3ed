"""``lowkernels_cuda::*``: the schemas of the operators in ``csrc/cuda/bind.cpp``, and their fakes.

They write to ``out``, which the caller allocates. The library's kernels may be registered before or after.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("lowkernels_cuda", "DEF")

SCHEMAS: dict[str, str] = {
    "separable_conv": "Tensor x, Tensor dw, Tensor dw_bias, Tensor pw, Tensor pw_bias, Tensor(a!) out, int kernel, int stride, "
    "int padding, int dw_act, int pw_act, bool residual, int[] tile",
    "conv_act": "Tensor x, Tensor weight, Tensor bias, Tensor[] residual, Tensor(a!) out, int kernel, int stride, int padding, "
    "int act, bool pool, int images, int config",
    "conv_act_sm90": "Tensor x, Tensor slabs, Tensor bias, Tensor[] residual, Tensor(a!) out, int kernel, int stride, int padding, "
    "int act, bool pool, int images, int pixels, int column_ctas, int config",
    "mbconv": "Tensor x, Tensor expand, Tensor expand_bias, Tensor dw, Tensor dw_bias, Tensor project, Tensor project_bias, "
    "Tensor(a!) out, Tensor(b!)[] split, int kernel, int stride, int padding, int act, bool residual, int[] tile, int splits",
    "mbconv_sm90": "Tensor x, Tensor slabs, Tensor expand_bias, Tensor dw, Tensor dw_bias, Tensor project_bias, Tensor(a!) out, "
    "int kernel, int stride, int padding, int act, bool residual, int[] tile",
    "fused_mbconv": "Tensor x, Tensor expand, Tensor expand_bias, Tensor project, Tensor project_bias, Tensor(a!) out, "
    "Tensor(b!)[] split, int kernel, int stride, int padding, int act, bool residual, int[] tile, int splits",
    "fused_mbconv_sm90": "Tensor x, Tensor slabs, Tensor expand_bias, Tensor project_bias, Tensor(a!) out, int kernel, int stride, "
    "int padding, int act, bool residual, int[] tile",
    "gn_mlp_sm90": "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor slabs, Tensor expand_bias, Tensor project_bias, "
    "Tensor(b!)[] partial, Tensor(a!) out, float eps, int act, bool residual, int[] tile",
    "gn_mlp": "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor expand, Tensor expand_bias, Tensor project, "
    "Tensor project_bias, Tensor(b!)[] partial, Tensor(a!) out, Tensor(c!)[] split, float eps, int act, bool residual, int[] tile, "
    "int splits",
    "lowtention": "Tensor x, Tensor[] norm, Tensor dw, Tensor dw_bias, Tensor qkv, Tensor up, Tensor up_bias, "
    "Tensor(b!)[] scratch, Tensor(a!) out, float eps, float scale, int heads, int inner, int kernel, int stride, int images, "
    "int shares, bool residual",
}


def _fake(*args: object) -> None:
    """Nothing to infer: the output is an argument."""


for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(f"{_name}({_schema}) -> ()")
    torch.library.register_fake(f"lowkernels_cuda::{_name}", _fake, lib=_LIBRARY)
