"""accelerate() and restore(): the drop-in modules in anyone's model.

``recording`` watches what a module computes, ``patterns`` says which operator that is, ``verification`` proves it by numbers,
``batchnorm`` folds what is left, and ``swap`` puts it all into a model and takes it out again.
"""

from __future__ import annotations

from .swap import accelerate, restore

__all__ = ["accelerate", "restore"]
