"""Options of the microbenchmarks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lowkernels benchmarks")
    group.addoption(
        "--layers",
        choices=("smoke", "main", "all"),
        default="main",
        help="smoke: one small layer of every operator; main: LowFormer-B1 at 224; all: every LowFormer layer at 224 and 512, "
        "MobileNetV2 and EfficientNet-Lite0",
    )
    group.addoption("--on", choices=("cpu", "cuda"), default=None, help="device; default: the GPU if there is one")
