"""Make timm and torchvision importable beside a PyTorch that torchvision has no compiled operators for."""

from __future__ import annotations

import contextlib

import torch

# those that torchvision's Python code refers to while it is imported
_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)
_library: torch.library.Library | None = None


def install() -> None:
    """Declare torchvision's operators where its own are missing; calling one of these is an error.

    Where torchvision brings its own they are loaded first, and nothing is declared.
    """
    global _library
    if _library is not None:
        return
    with contextlib.suppress(ImportError, RuntimeError, AttributeError, OSError):
        import torchvision  # noqa: F401

    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _library.define(f"{name}() -> ()")
