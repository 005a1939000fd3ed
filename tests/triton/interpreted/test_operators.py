"""Every operator, on the CPU, in Triton's interpreter: results, determinism, refusals."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import lowformer
import lowkernels
from lowkernels.backends.triton import configs, expand_project, model
from lowkernels.backends.triton.launch import Target, planning_for, run
from lowkernels.choosing import settings
from lowkernels.ops import OPERATORS
from lowkernels.testing import assert_within_budget, check_call, random_call
from tests.triton.cases import CASES, call

DTYPES = [torch.float32, torch.float16]
NUMBERED = [(operator, number) for operator in CASES for number in range(len(CASES[operator]))]


@pytest.fixture(autouse=True)
def _unwritten_memory_shows() -> Iterator[None]:
    """Allocations are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
@pytest.mark.parametrize(("operator", "number"), NUMBERED)
def test_case(operator: str, number: int, dtype: torch.dtype) -> None:
    check_call(*call(operator, number, dtype), backend="triton")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("operator", list(CASES))
def test_every_shipped_configuration(operator: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile sizes decide masks and loop counts, so each is run once, whatever shape its row is meant for."""
    rows = [row["config"] for row in configs.table(operator) if configs.serves(row, arch, "float16")]
    number = {"lowtention": 1, "gn_mlp": 1}.get(operator, 0)
    for config in rows:
        monkeypatch.setattr(configs, "choose", lambda *_, _config=config, **__: {**_config, "row": -1, "tuned": 0})
        for case in (number, len(CASES[operator]) - 2):
            with planning_for(Target(arch, 4)):
                check_call(*call(operator, case, torch.float16), backend="triton")


@pytest.mark.parametrize("operator", list(CASES))
def test_every_candidate_of_the_model(operator: str) -> None:
    """On images with odd sides and channels that need padding."""
    number = 2 if operator == "lowtention" else 0
    for config in model.candidates(operator, "float16"):
        with settings.using(config):
            check_call(*call(operator, number, torch.float16), backend="triton")


@pytest.mark.parametrize("operator", list(CASES))
def test_picks_of_the_model(operator: str) -> None:
    """As on GPUs no table has a row for: a large one, a small one, and one with next to no shared memory."""
    for target in (Target(103, 148), Target(87, 1), Target(130, 8, 24 << 10)):
        with planning_for(target):
            made = call(operator, 1, torch.float16)
            check_call(*made, backend="triton")
            module = importlib.import_module(f"lowkernels.ops.{operator}.triton")
            packed = module.pack(*OPERATORS[operator].weights(made.args))
            assert module.plan(*made.args, packed)[1][-1].origin == "cost model"


# Activations that map infinity to something finite, channels that need padding, and several images in a tile.
_FRAGILE: dict[str, dict[str, Any]] = {
    "conv_act": {"channels": 20, "out_channels": 24, "stride": 2, "act": "relu6"},
    "separable_conv": {"channels": 20, "out_channels": 24, "act": "relu6"},
    "mbconv": {"channels": 20, "hidden": 40, "act": "relu6", "residual": False},
    "fused_mbconv": {"channels": 20, "hidden": 40, "act": "relu6", "residual": False},
    "gn_mlp": {"channels": 20, "hidden": 40, "act": "relu6"},
    "lowtention": {"channels": 20, "num_heads": 1, "head_dim": 12},
}


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("operator", list(CASES))
def test_what_is_not_finite_stays_where_it_belongs(operator: str, value: float) -> None:
    """One such element reaches the outputs that it reaches in eager PyTorch, and no other image, pixel or channel."""
    x, *rest = random_call(operator, batch=3, height=5, width=3, **_FRAGILE[operator]).args
    x[1, 7, 2, 0] = value
    found = OPERATORS[operator].overload(x, *rest, None, None, "triton")
    expected = OPERATORS[operator].overload(x, *rest, None, None, "eager")
    assert torch.equal(found.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", list(CASES))
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (6, 1)])
def test_narrow_images(operator: str, height: int, width: int) -> None:
    for stride in (1,) if operator == "gn_mlp" else (1, 2):
        options = {"batch": 3, "channels": 24, "height": height, "width": width, "stride": stride, "num_heads": 3}
        check_call(*random_call(operator, **options), backend="triton")


@pytest.mark.parametrize("operator", list(CASES))
def test_packs_on_the_spot(operator: str) -> None:
    check_call(*call(operator, 0, torch.float32), backend="triton", packed=False)


@pytest.mark.parametrize("operator", list(CASES))
def test_same_bits_every_run(operator: str) -> None:
    made = call(operator, 0, torch.float16)
    first, second = (check_call(*made, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_statistics_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the image is shorter than the number of pieces, and not a multiple of them."""
    monkeypatch.setattr(expand_project, "INLINE_STATISTICS", 0)
    for height, width in ((1, 1), (1, 3), (5, 7), (16, 16)):
        check_call(*random_call("gn_mlp", batch=3, channels=12, height=height, width=width), backend="triton")


def test_small_norm_weights_survive_folding_in_half_precision() -> None:
    made = random_call("gn_mlp", channels=32, dtype=torch.float16)
    x, norm_weight, norm_bias, *rest = made.args
    check_call("gn_mlp", (x, norm_weight * 1e-4, norm_bias * 1e-4, *rest), backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
def test_constant_image(dtype: torch.dtype) -> None:
    """No variance: what is left of the input is the error of its mean, times 1 / sqrt(eps)."""
    x, *rest = random_call("gn_mlp", channels=32, dtype=dtype, residual=False).args
    check_call("gn_mlp", (torch.full_like(x, 3.0), *rest), backend="triton")


@pytest.mark.parametrize("act", lowkernels.ops.ACTIVATIONS)
def test_activation(act: str) -> None:
    made = random_call("conv_act", channels=16, kernel_size=1, act=act, residual=False)
    x, *rest = made.args
    check_call("conv_act", (8 * x, *rest), backend="triton")


def test_nan_stays_nan() -> None:
    for act in lowkernels.ops.ACTIVATIONS:
        x, *rest = random_call("conv_act", channels=16, kernel_size=1, act=act, residual=False).args
        x[0, 3, 2, 1] = float("nan")
        out = OPERATORS["conv_act"].overload(x, *rest, None, None, "triton")
        assert out[0, :, 2, 1].isnan().all(), act
        assert out.isnan().sum() == out.shape[1], act


def _refusal(operator: str, **options: Any) -> str:
    made = random_call(operator, **options)
    with pytest.raises(lowkernels.BackendError) as caught:
        OPERATORS[operator].overload(*made.args, None, None, "triton")
    return str(caught.value)


def test_refusals_name_the_reason() -> None:
    assert "bfloat16" in _refusal("mbconv", dtype=torch.bfloat16)
    assert "float64" in _refusal("gn_mlp", dtype=torch.float64)
    assert "multiples of 4" in _refusal("separable_conv", channels=6)
    assert "head dimension is 132" in _refusal("lowtention", channels=8, num_heads=1, head_dim=132)


def test_auto_does_not_choose_the_interpreter() -> None:
    assert OPERATORS["mbconv"].explain(*random_call("mbconv").args).backend != "triton"


@pytest.mark.parametrize("operator", list(CASES))
def test_empty_batch(operator: str) -> None:
    made = random_call(operator, batch=0, channels=32)
    assert OPERATORS[operator].overload(*made.args, None, None, "triton").shape == made.args[0].shape


def test_refuses_what_its_numbers_cannot_hold() -> None:
    """Offsets within a window have 32 bits; blocks of tokens are counted along an axis of the grid of 16."""

    def refusal(operator: str, x: Tensor) -> str:
        rest = random_call(operator, channels=x.shape[1]).args[1:]
        return importlib.import_module(f"lowkernels.ops.{operator}.triton").unsupported_input(x, *rest)

    def nhwc(height: int, width: int, channels: int) -> Tensor:
        return torch.empty((1, channels, height, width), device="meta")

    for operator in CASES:
        assert "2**30 pixels" in refusal(operator, nhwc(2**15, 2**15, 4)) or operator == "lowtention"
        assert "elements a row" in refusal(operator, nhwc(1, 2**27, 4)) or operator == "lowtention"
        assert not refusal(operator, nhwc(512, 512, 8))
    assert "2**20" in refusal("lowtention", nhwc(1024, 1024, 8))


def test_whole_model() -> None:
    """A model's operators one after another, on a size that is odd at every stage."""
    torch.manual_seed(0)
    eager = lowformer.create_model("lowformer_b0", kernels="eager").eval()
    model = lowformer.create_model("lowformer_b0", kernels="triton").eval()
    model.load_state_dict(eager.state_dict())
    x = torch.randn(1, 3, 37, 45)
    with torch.no_grad():
        found, expected = model(x), eager(x)
        reference = eager.double()(x.double())
    # The longest sum is the one over the window of the last downsampling block.
    assert_within_budget(found, expected, reference, 9 * 128)
    assert all(row.sizes.startswith("table row") for row in lowkernels.report(model).replaced if row.ran_on == "triton")


def test_packed_weights_are_freed() -> None:
    """Descriptors are kept as long as the tensors they describe, no longer, and do not hinder copies."""
    made = random_call("fused_mbconv", channels=32, dtype=torch.float16)
    packed = OPERATORS["fused_mbconv"].pack(*OPERATORS["fused_mbconv"].weights(made.args), backend="triton")
    OPERATORS["fused_mbconv"].overload(*made.args, packed.tensors, packed.backend, "triton")
    copied = copy.deepcopy(packed.tensors)
    assert all(torch.equal(a, b) for a, b in zip(copied, packed.tensors, strict=True))
    watched = [weakref.ref(tensor) for tensor in packed.tensors]
    del packed
    gc.collect()
    assert not any(reference() is not None for reference in watched)


def test_changed_packed_weights_are_read() -> None:
    operator = OPERATORS["fused_mbconv"]
    made = random_call("fused_mbconv", channels=32, dtype=torch.float16)
    other = random_call("fused_mbconv", channels=32, dtype=torch.float16, seed=1)
    packed = operator.pack(*operator.weights(made.args), backend="triton")
    operator.overload(*made.args, packed.tensors, packed.backend, "triton")
    changed = (made.args[0], *other.args[1:])
    for old, new in zip(packed.tensors, operator.pack(*operator.weights(changed), backend="triton").tensors, strict=True):
        old.copy_(new)
    found = operator.overload(*changed, packed.tensors, packed.backend, "triton")
    assert torch.equal(found, operator.overload(*changed, None, None, "triton"))


@pytest.mark.parametrize("operator", ["conv_act", "separable_conv", "fused_mbconv", "gn_mlp", "lowtention"])
def test_offsets_beyond_32_bits(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last program is run, on a tensor of more than 2**31 elements whose memory exists in its last image alone."""
    torch.use_deterministic_algorithms(False)
    size = 8 if operator == "lowtention" else 32
    options = {"channels": 32, "hidden": 32, "batch": 1, "height": size, "width": size, "residual": operator != "conv_act"}
    made = random_call(operator, **options, dtype=torch.float16)
    image, *weights = made.args
    batch = 2**31 // image.numel() + 2
    x = torch.empty((batch, *image.shape[1:]), dtype=torch.float16, memory_format=torch.channels_last)
    x[-1] = image[0]
    module = importlib.import_module(f"lowkernels.ops.{operator}.triton")
    out, (planned,) = module.plan(x, *weights, module.pack(*OPERATORS[operator].weights(made.args)))
    last = planned.grid[0] - 1
    builder = interpreter.interpreter_builder
    extend, place = builder.set_grid_dim, builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_dim", lambda i, j, k: extend(i + last, j, k))
    monkeypatch.setattr(builder, "set_grid_idx", lambda i, j, k: place(i + last, j, k))
    run([dataclasses.replace(planned, grid=(1, *planned.grid[1:]))], x)
    monkeypatch.undo()
    rows = planned.constants["BM"] if operator != "lowtention" else size * size

    def last_rows(image: Tensor) -> Tensor:
        return image[-1].permute(1, 2, 0).reshape(-1, image.shape[1])[-rows:]

    eager = OPERATORS[operator].overload(*made.args, None, None, "eager")
    exact = (a.double() if isinstance(a, Tensor) else a for a in made.args)
    reference = OPERATORS[operator].overload(*exact, None, None, "eager")
    length = OPERATORS[operator].accumulation_length(*made.args)
    assert_within_budget(last_rows(out), last_rows(eager), last_rows(reference), length, operator)
