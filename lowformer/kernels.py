"""Put the drop-in modules of ``lowkernels.nn`` in the place of LowFormer's plain blocks.

They adopt the blocks' children, so parameter names and values stay what they are.
"""

from __future__ import annotations

from torch import nn

from lowkernels.nn import ConvNormAct, FusedBlock, GroupNormMLP, chain_blocks, make_whole
from lowkernels.nn import FusedMBConv as FusedMBConvKernel
from lowkernels.nn import Linear as LinearKernel
from lowkernels.nn import Lowtention as LowtentionKernel
from lowkernels.nn import MBConv as MBConvKernel

from .blocks import MLP, ConvLayer, FusedMBConv, Lowtention, MBConv, ResidualBlock


def use_kernels(model: nn.Module, *, backend: str = "auto") -> nn.Module:
    """Replace every block of a LowFormer, in place, by the module that runs it as one operator.

    Args:
        model: a LowFormer, or its features-only form.
        backend: what the operators run on: ``"auto"`` or the name of a backend.

    Returns:
        ``model``.

    Raises:
        lowkernels.BackendError: ``backend`` is unknown or can never serve one of the blocks.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name == "in_conv" and isinstance(child, ConvLayer):
                setattr(parent, name, _conv_layer(child, backend, pool=True))
            elif isinstance(child, ResidualBlock):
                setattr(parent, name, _residual(child, backend))
            elif isinstance(child, ConvLayer) and parent is getattr(model, "stem", None):
                setattr(parent, name, _conv_layer(child, backend))
            elif type(child) is nn.Linear:
                setattr(parent, name, LinearKernel(child, backend=backend))
    for parent, name, chain in chain_blocks(model):
        setattr(parent, name, chain)
    make_whole(model)
    return model


def _conv_layer(layer: ConvLayer, backend: str, pool: bool = False) -> FusedBlock:
    return ConvNormAct.from_module(layer, conv="conv", norm="norm", act="hardswish", pool=pool, backend=backend)


def _residual(block: ResidualBlock, backend: str) -> nn.Module:
    main, residual = block.main, block.shortcut is not None
    if isinstance(main, FusedMBConv):
        return FusedMBConvKernel.from_module(
            block,
            conv="main.spatial_conv.conv",
            conv_norm="main.spatial_conv.norm",
            project="main.point_conv.conv",
            project_norm="main.point_conv.norm",
            act="hardswish",
            residual=residual,
            backend=backend,
        )
    if isinstance(main, MBConv):
        return MBConvKernel.from_module(
            block,
            expand="main.inverted_conv.conv",
            dw="main.depth_conv.conv",
            project="main.point_conv.conv",
            project_norm="main.point_conv.norm",
            act="hardswish",
            residual=residual,
            backend=backend,
        )
    if isinstance(main, MLP):
        names = {"norm": "main.0", "fc1": "main.1", "fc2": "main.3"}
        return GroupNormMLP.from_module(block, **names, act="gelu", residual=residual, backend=backend)
    normed = not isinstance(main, Lowtention)
    attention = main[1] if isinstance(main, nn.Sequential) else main
    if not isinstance(attention, Lowtention):
        return block
    prefix = "main.1" if normed else "main"
    return LowtentionKernel.from_module(
        block,
        norm="main.0" if normed else None,
        dw=f"{prefix}.conv_proj.conv",
        dw_norm=f"{prefix}.conv_proj.norm",
        qkv=f"{prefix}.pwise",
        up=f"{prefix}.upsampling",
        num_heads=attention.num_heads,
        residual=residual,
        backend=backend,
    )
