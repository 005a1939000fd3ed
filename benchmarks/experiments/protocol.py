"""Throughput at batch 200 and latency at batch 1, by the protocol of the LowFormer papers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import lowformer
from lowformer.config import VARIANTS

from .. import plans, render, rows
from ..plans import Item
from ..rivals import EAGER
from ..rows import Results
from ..timing import Effort
from .experiment import AUTO, FOLDED, QUICK, TINY, TORCHSCRIPT, Experiment, best, over, time

BATCH = 200
SIZE = 224


def items(device: str, scale: str) -> Sequence[Item]:
    """Every variant at both batches; a quick run has one of them at the large batch."""
    if scale == TINY:
        return [plans.model_item("lowformer_b0", 64, batch, torch.float32, device) for batch in (3, 1)]
    dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.float16)
    models = lowformer.list_models()
    # The large batch early, so that there is one if time runs out.
    places = [(models[0], 1), (models[0], BATCH)] + [(model, 1) for model in models[1:]]
    if scale != QUICK:
        places = [(model, batch) for batch in (1, BATCH) for model in models]
    return [plans.model_item(model, SIZE, batch, dtype, device) for dtype in dtypes for model, batch in places]


def table(results: Results) -> str:
    """A line for each variant, batch and dtype."""
    header = ("model", "batch", "dtype", "eager ms", "folded ms", "TorchScript ms", "lowkernels ms", "images/s", "over TorchScript")
    body = []
    for group in results.groups().values():
        eager, folded, script, ours = (best(group, name) for name in (EAGER, FOLDED, TORCHSCRIPT, AUTO))
        first = group[0]
        rate = None if ours is None else ours.images_per_s
        published = VARIANTS[first.subject].a40_images_per_s
        body.append(
            (
                first.subject,
                str(first.batch),
                rows.SHORT_DTYPES[first.dtype],
                *(time(row) for row in (eager, folded, script, ours)),
                render.number(rate),
                over(script, ours),
                render.number(published, 4) if first.batch == BATCH else "–",
            )
        )
    return render.table((*header, "published, A40"), body)


EXPERIMENT = Experiment(
    "protocol",
    "Throughput at batch 200 and latency at batch 1",
    "How fast are the models by the protocol of the papers: 224 px, float32, `torch.jit.optimize_for_inference`, batch 200 for "
    "throughput and 1 for latency, medians after a warm-up? Theirs times one call after another of a single model; here "
    "the contenders take turns, as everywhere, and TorchScript is traced and frozen first, as PyTorch's documentation has it. The "
    "published images/s (batch 200, float32, TorchScript) are of another device and stand there for orientation only.",
    "arXiv 2409.03460, and `eval_cls_model.py` of github.com/altair199797/LowFormer",
    items,
    table,
    quick=Effort(turn_s=0.02, rounds=5, max_s=60.0),
)
