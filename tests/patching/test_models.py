"""accelerate() and restore() on whole models of several libraries, with random weights and BatchNorm statistics."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lowkernels
from lowkernels.nn import Chain
from lowkernels.nn.block import FusedBlock
from lowkernels.ops import OPERATORS
from lowkernels.patching.batchnorm import FoldedNorm, FoldedNormConv
from lowkernels.patching.verification import is_candidate
from lowkernels.testing import assert_within_budget
from tests.lowformer.helpers import authors_shapes, authors_state, golden, images
from tests.patching import official, table
from tests.patching.helpers import LONGEST_SUM, Snapshot, counts, image, randomise, run
from tests.patching.zoo import ZOO, Entry


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: f"{e.source}-{e.name}")
def test_accelerated_and_restored(entry: Entry) -> None:
    model = randomise(entry.build())
    # Other than the sizes it is recognised and tried on, and odd where the model allows it.
    x = image(2, 3, entry.size, entry.size if entry.size == 224 else entry.size + 9)
    eager = run(model, x)[0]
    truth = run(copy.deepcopy(model).double(), x.double())[0]
    snapshot = Snapshot(model)
    names = dict(model.named_modules())
    candidates = {name for name, module in names.items() if is_candidate(module)}

    assert lowkernels.accelerate(model, backend="eager") is model
    report = lowkernels.report(model)
    assert counts(report) == dict(sorted(entry.replaced.items()))
    assert table.line(entry, report) in table.PAGE.read_text(), "run python -m tests.patching.table"
    snapshot.assert_state_kept()
    accelerated = run(model, x)[0]
    assert_within_budget(accelerated, eager, truth, LONGEST_SUM, entry.name)

    # Every module that was looked at has one row, which says what became of it.
    rows = {row.name: row for row in report}
    assert len(rows) == len(report)
    now = dict(model.named_modules())
    for name, module in names.items():
        row = rows.get(name)
        parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
        if any(isinstance(now.get(p), FusedBlock) for p in parents):
            assert row is None, f"{name} is inside a replaced block"
        elif isinstance(now[name], FusedBlock) and not isinstance(now[name], FoldedNormConv):
            assert row is not None
            assert row.replaced
            assert row.kind in OPERATORS
            assert now[name].original is module
        elif isinstance(now[name], FoldedNorm):
            assert row is not None
            assert row.replaced
            conv = row.reason.removeprefix("folded into ").removesuffix(" in eval mode")
            assert isinstance(now[conv], FoldedNormConv)
        elif name in candidates:
            assert row is not None, name
            assert not row.replaced
            assert row.reason
            assert (now[name].original if isinstance(now[name], Chain) else now[name]) is module
        else:
            assert row is None or not row.replaced

    assert lowkernels.restore(model) is model
    snapshot.assert_restored()
    assert torch.equal(run(model, x)[0], eager)
    assert len(lowkernels.report(model)) == 0


def test_the_accelerated_backend_is_the_one_asked_for() -> None:
    model = lowkernels.accelerate(randomise(ZOO[7].build()), backend="eager")
    run(model, image(1, 3, 64, 64))
    served = [row for row in lowkernels.report(model).replaced if row.kind in OPERATORS]
    assert {row.backend for row in served} == {"eager"}
    assert {row.ran_on for row in served} == {"eager"}


def test_fused_attention_or_not_makes_no_difference() -> None:
    from timm.layers import set_fused_attn

    try:
        set_fused_attn(False)
        import timm

        model = randomise(timm.create_model("lowformer_b0"))
    finally:
        set_fused_attn(True)
    lowkernels.accelerate(model, backend="eager")
    assert counts(lowkernels.report(model))["lowtention"] == 7


@pytest.mark.parametrize("name", ["lowformer_b0", "lowformer_b15", "lowformer_e1", "lowformer_e3"])
def test_the_authors_module_tree_is_recognised(name: str) -> None:
    """Compared with our own LowFormer, whose blocks ``lowformer.create_model(kernels=...)`` knows."""
    import lowformer

    with torch.device("meta"):
        model = official.Model(authors_shapes(name)).eval()
        ours = lowformer.create_model(name, kernels="eager").eval()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == authors_shapes(name)
    lowkernels.accelerate(model, backend="eager")
    lowkernels.accelerate(ours, backend="eager")
    expected = counts(lowkernels.report(ours))
    assert counts(lowkernels.report(model)) == expected
    assert not any(isinstance(m, nn.BatchNorm2d) for n, m in model.named_modules() if not _inside_block(model, n))


def _inside_block(model: nn.Module, name: str) -> bool:
    parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
    return any(isinstance(model.get_submodule(p), FusedBlock) for p in parents)


@pytest.mark.parametrize(("name", "case"), [("lowformer_b0", "odd"), ("lowformer_b1", "224"), ("lowformer_e3", "odd")])
def test_the_authors_logits(name: str, case: str) -> None:
    expected = golden(name, case)
    model = official.Model(authors_shapes(name)).double()
    model.load_state_dict(authors_state(name))
    lowkernels.accelerate(model.eval(), backend="eager")
    assert sum(isinstance(m, FusedBlock) for m in model.modules()) > 20
    logits = run(model, images(*expected["case"]))[0].numpy()
    assert np.abs(logits - expected["logits"]).max() <= 1e-9
