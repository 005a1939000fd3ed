"""The one header rule, without which the kernels could not run on a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cuda.execution import SOURCES

# What only device.cuh may contain.
FORBIDDEN = re.compile(
    r"\basm\b|\b__[a-z]\w*|\b(threadIdx|blockIdx|blockDim|gridDim|cudaStream_t)\b|<<<|\bcuda_\w+\.h\b"
    r"|\b(expf?|erff?|tanhf?|rsqrtf?|sqrtf|fmaf|atomic\w+)\("
)


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


@pytest.mark.parametrize(
    "path", [p for p in sorted(SOURCES.iterdir()) if p.suffix in (".cu", ".cuh") and p.name != "device.cuh"], ids=lambda p: p.name
)
def test_only_the_device_header_knows_the_machine(path: Path) -> None:
    found = FORBIDDEN.findall(without_comments(path.read_text()))
    assert not FORBIDDEN.search(without_comments(path.read_text())), found


def test_the_rule_sees_what_it_forbids() -> None:
    for line in (
        'asm("x");',
        "__syncthreads();",
        "int i = threadIdx.x;",
        "kernel<<<1, 2>>>();",
        "y = expf(x);",
        "__shared__ int a;",
    ):
        assert FORBIDDEN.search(line), line
    assert not FORBIDDEN.search("y = exponential(x);")


@pytest.mark.parametrize("path", [p for p in sorted(SOURCES.iterdir()) if p.suffix in (".cu", ".cuh")], ids=lambda p: p.name)
def test_torch_stays_in_the_binding(path: Path) -> None:
    assert "torch" not in without_comments(path.read_text())
