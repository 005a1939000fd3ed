"""LowFormer on the fused operators: the same model, within the error budget, under the compiler and in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lowformer
import lowkernels
from lowkernels.testing import assert_within_budget
from tests.lowformer.helpers import VARIANTS, golden, golden_cases, images, reference_model

# Residual units and plain convolutions of each variant: what the six operators have to take over, all of it.
OPERATORS = {
    "lowformer_b0": {"conv_act": 4, "fused_mbconv": 7, "lowtention": 7, "gn_mlp": 7, "mbconv": 4},
    "lowformer_b1": {"conv_act": 4, "fused_mbconv": 9, "lowtention": 10, "gn_mlp": 10, "mbconv": 5},
    "lowformer_b15": {"conv_act": 4, "fused_mbconv": 10, "lowtention": 12, "gn_mlp": 12, "mbconv": 6},
    "lowformer_b2": {"conv_act": 4, "fused_mbconv": 10, "lowtention": 12, "gn_mlp": 12, "mbconv": 6},
    "lowformer_b3": {"conv_act": 4, "fused_mbconv": 8, "lowtention": 12, "gn_mlp": 12, "mbconv": 12},
    "lowformer_e1": {"conv_act": 4, "fused_mbconv": 8, "mbconv": 4},
    "lowformer_e2": {"conv_act": 4, "fused_mbconv": 8, "mbconv": 8},
    "lowformer_e3": {"conv_act": 4, "fused_mbconv": 8, "lowtention": 12, "mbconv": 12},
}


def longest_sum(model: nn.Module) -> int:
    return max(m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def counts(model: nn.Module) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for row in lowkernels.report(model).replaced:
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    return kinds


@pytest.fixture(scope="module")
def b0() -> lowformer.LowFormer:
    return reference_model("lowformer_b0", "auto", torch.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_block_runs_as_one_operator(name: str) -> None:
    with torch.device("meta"):
        model = lowformer.create_model(name, kernels="auto")
        plain = lowformer.create_model(name, kernels="eager")
    assert counts(model) == OPERATORS[name]
    assert all(row.replaced for row in lowkernels.report(model))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize(("name", "case"), golden_cases())
def test_float32_is_within_the_budget_of_the_authors_outputs(name: str, case: str) -> None:
    expected = golden(name, case)
    x = images(*expected["case"], dtype=torch.float32)
    eager, fused = (reference_model(name, kernels, torch.float32) for kernels in ("eager", "auto"))
    with torch.no_grad():
        assert_within_budget(fused(x), eager(x), torch.as_tensor(expected["logits"]), longest_sum(eager), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_the_budget(dtype: torch.dtype, b0: lowformer.LowFormer) -> None:
    eager = reference_model("lowformer_b0", "eager").to(dtype)
    x = images(2, 96, 64).to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(eager).double()(x.double())
        fused = reference_model("lowformer_b0", "auto").to(dtype)
        assert_within_budget(fused(x), eager(x), expected, longest_sum(eager), "b0")


def test_restore_gives_the_plain_model(b0: lowformer.LowFormer) -> None:
    plain = lowkernels.restore(copy.deepcopy(b0))
    eager = reference_model("lowformer_b0", "eager", torch.float32)
    assert [type(m) for m in plain.modules()] == [type(m) for m in eager.modules()]
    x = images(1, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(x), eager(x))


def test_compiles_whole_and_once_for_all_batch_sizes(b0: lowformer.LowFormer) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(b0, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 7):
            x = images(batch, 64, 64, dtype=torch.float32)
            with torch._dynamo.config.patch(error_on_recompile=batch > 2):
                out = compiled(x)
            same_numbers(out, b0(x))


def test_exports_with_a_dynamic_batch(b0: lowformer.LowFormer) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    example = images(2, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(b0, (example,), dynamic_shapes={"x": {0: batch}})
        names = [str(node.target) for node in program.graph.nodes if "lowkernels" in str(node.target)]
        # A graph's fully connected layers are the compiler's.
        assert len(names) == sum(OPERATORS["lowformer_b0"].values()) - 2
        x = images(5, 64, 64, dtype=torch.float32)
        same_numbers(program.module()(x), b0(x))


def same_numbers(found: Tensor, expected: Tensor) -> None:
    """Equal but for what another order of the same float32 sums outside the operators may do."""
    torch.testing.assert_close(found, expected)


def test_autocast_runs_the_operators_in_its_dtype(b0: lowformer.LowFormer) -> None:
    x = images(1, 64, 64, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = b0.forward_features(x)
    assert features.dtype == torch.bfloat16
    assert b0.stages[0][0].last_call is not None
    # fp32 weights serve fp32 again afterwards.
    with torch.no_grad():
        assert b0.forward_features(x).dtype == torch.float32


def test_features_only_uses_the_operators() -> None:
    torch.manual_seed(0)
    model = lowformer.create_model("lowformer_b0", kernels="auto", features_only=True).eval()
    plain = lowformer.create_model("lowformer_b0", kernels="eager", features_only=True).eval()
    plain.load_state_dict(model.state_dict())
    x = images(1, 65, 47, dtype=torch.float32)
    with torch.no_grad():
        for found, expected, info in zip(model(x), plain(x), (32, 64, 128, 256), strict=True):
            assert found.shape == expected.shape
            assert found.shape[1] == info
            reference = copy.deepcopy(plain).double()(x.double())[[32, 64, 128, 256].index(info)]
            assert_within_budget(found, expected, reference, longest_sum(plain), f"{info} channels")


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(lowkernels.BackendError, match=r"nonesuch.*allowed are"):
        lowformer.create_model("lowformer_b0", kernels="nonesuch")
