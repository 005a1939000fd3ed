"""A loop in Triton's interpreter, and nothing of this project: ``test_interpreter.py`` asks whether that works here at all."""

import torch
import triton
import triton.language as tl


@triton.jit
def count(out, n):
    total = 0
    for _ in tl.range(0, n):
        total += 1
    tl.store(out, total)


out = torch.zeros(1, dtype=torch.int32)
count[(1,)](out, 3)
assert out.item() == 3
