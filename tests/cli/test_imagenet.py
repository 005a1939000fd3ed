from __future__ import annotations

import pytest

from lowformer.imagenet import class_names


def test_there_are_1000_distinct_names() -> None:
    names = class_names()
    assert len(names) == 1000
    assert len(set(names)) == 1000
    assert all(name and name == name.strip() for name in names)


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0, "tench"),
        (134, "crane (bird)"),
        (207, "golden retriever"),
        (281, "tabby"),
        (285, "Egyptian cat"),
        (517, "crane (machine)"),
        (639, "tank suit"),
        (999, "toilet tissue"),
    ],
)
def test_known_classes(index: int, name: str) -> None:
    assert class_names()[index] == name
