"""The names of the 1000 classes of ImageNet-1k."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

__all__ = ["class_names"]


@cache
def class_names() -> tuple[str, ...]:
    """Return the 1000 class names of ImageNet-1k in the order of a classifier's outputs.

    Each is the first lemma of the class's WordNet synset; the few that would name two classes are told apart,
    so all are distinct. Sources: `data/CREDITS.md` in this package.
    """
    text = (files("lowformer") / "data" / "imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
