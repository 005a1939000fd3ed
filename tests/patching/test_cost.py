"""What accelerate() itself costs: processor time and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowformer
import lowkernels
from lowkernels.patching import verification
from tests.patching.helpers import fused, randomise

MEASURE = """
import time, torch
torch.set_num_threads(1)
import lowformer, lowkernels
model = lowformer.create_model("lowformer_b3", kernels="eager").eval()
start = time.process_time()
lowkernels.accelerate(model, backend="eager")
print(time.process_time() - start)
"""


def test_the_largest_lowformer_takes_less_than_two_seconds() -> None:
    """Processor time of one thread in a fresh process, so with everything that is imported on the way."""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2.0


def test_at_most_one_more_copy_of_the_replaced_weights() -> None:
    model = randomise(lowformer.create_model("lowformer_b1", kernels="eager"))
    before = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    lowkernels.accelerate(model, backend="eager")
    blocks = fused(model)
    replaced = sum(p.nbytes for block in blocks for p in block.parameters())
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    new = sum(size for pointer, size in tensors.items() if pointer not in before)
    roles = [(block, role) for block in blocks for role in block._CONVS]
    # The others are what the reference reads already, and are read where they are.
    changed = [block._part(role) for block, role in roles if f"{role}_norm" in block._parts or role == "up"]
    copied = sum(part.weight.nbytes for part in changed)
    # A folded BatchNorm leaves a bias where the convolution had none, less than the norm's own four vectors.
    assert copied < new <= copied + sum(4 * part.weight[:, 0, 0, 0].nbytes for part in changed)
    assert new < replaced


def test_blocks_alike_are_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowkernels.patching import swap

    watched = []
    real = verification.recognise
    monkeypatch.setattr(swap, "recognise", lambda module: watched.append(module) or real(module))
    model = lowformer.create_model("lowformer_b3", kernels="eager").eval()
    lowkernels.accelerate(model, backend="eager")
    assert len(fused(model)) == 48
    assert len(watched) < 20


def test_what_makes_blocks_differ_is_seen() -> None:
    from tests.patching.helpers import InvertedResidual

    one = InvertedResidual()
    others = [InvertedResidual(kernel=5), InvertedResidual(hidden=8), InvertedResidual(act=torch.nn.SiLU), InvertedResidual()]
    others[-1].norm2.eps = 1e-3
    same = verification.signature(one)
    assert same is not None
    assert verification.signature(InvertedResidual()) == same
    assert all(verification.signature(other) not in (None, same) for other in others)
    tied = InvertedResidual()
    tied.norm2.weight = tied.norm1.weight
    assert verification.signature(tied) != same
    unknown = InvertedResidual()
    unknown.table = torch.zeros(2)  # type: ignore[assignment]
    assert verification.signature(unknown) is None
