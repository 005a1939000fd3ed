"""lowtention with several images a CTA: the same to the last bit as with one, and never at the price of idle multiprocessors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowkernels.backends.cuda import tiling
from lowkernels.choosing import settings, tuning
from lowkernels.ops.lowtention import cuda
from lowkernels.testing import check_call, random_call
from tests.cuda import execution
from tests.cuda.test_cuda_breakages import Breakage, variant

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
H200 = tiling.Device(227 * 1024, 228 * 1024, 132)
# Stages 3 and 4 of LowFormer: channels, heads, channels of a head.
STAGES = {
    "b1-3": (128, 2, 32),
    "b1-4": (256, 4, 32),
    "b15-3": (160, 2, 40),
    "b15-4": (320, 5, 32),
    "b2-3": (192, 3, 32),
    "b2-4": (384, 6, 32),
    "b3-3": (256, 4, 32),
    "b3-4": (512, 8, 32),
}
# How many images a CTA: the last CTA is not full; images begin and end anywhere in a tile; one token; a tile of keys or queries
# that is mostly another image's.
ODD: list[tuple[int, dict[str, Any]]] = [
    (2, {"height": 7, "width": 7, "batch": 3}),
    (2, {"height": 15, "width": 7, "stride": 2, "kernel_size": 5, "batch": 3}),
    (3, {"height": 5, "width": 7, "batch": 4, "norm": False}),
    (4, {"height": 4, "width": 4, "batch": 5, "num_heads": 1, "head_dim": 40, "out_channels": 20}),
    (7, {"height": 3, "width": 6, "batch": 9, "head_dim": 48, "stride": 2, "residual": False}),
    (20, {"height": 1, "width": 1, "batch": 33, "head_dim": 4}),
    (5, {"height": 1, "width": 17, "batch": 6, "kernel_size": 7, "bias": False}),
    (2, {"height": 8, "width": 8, "batch": 2, "num_heads": 1, "head_dim": 64}),
]


# Shares of the transposed convolution, or what the plan says.
SHARES = {"of": 1}
PLANNED = cuda.shares_of


@pytest.fixture(autouse=True)
def larger_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "SMALLEST", H200)
    monkeypatch.setattr(cuda, "shares_of", lambda *args: SHARES["of"])


def run(library: Path, args: tuple[Any, ...], images: int, schedule: int = 0, shares: int = 1) -> torch.Tensor:
    with (
        pytest.MonkeyPatch.context() as patch,
        settings.using({"images": images}),
        execution.watched(library, execution.SCHEDULES[schedule]) as outcome,
    ):
        patch.setitem(SHARES, "of", shares)
        result = execution.run("lowtention", args)
    assert not outcome.reports, "\n".join(outcome.reports)
    assert outcome.blocks == -(-args[0].shape[0] // images) * shares
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "shape"), ODD)
def test_same_as_one_image(kernels: Path, images: int, shape: dict[str, Any], dtype: str) -> None:
    call = random_call("lowtention", dtype=DTYPES[dtype], **{"channels": 20, "num_heads": 2, "head_dim": 12, **shape})
    alone = run(kernels, call.args, 1)
    for schedule in range(len(execution.SCHEDULES)):
        assert torch.equal(run(kernels, call.args, images, schedule), alone)
    with settings.using({"images": images}), execution.watched(kernels):
        check_call(*call, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "shape"), [*ODD[:4], (1, {"height": 12, "width": 13, "batch": 1, "out_channels": 100})])
def test_same_with_several_ctas_an_image(kernels: Path, images: int, shape: dict[str, Any], dtype: str) -> None:
    call = random_call("lowtention", dtype=DTYPES[dtype], **{"channels": 20, "num_heads": 2, "head_dim": 12, **shape})
    alone = run(kernels, call.args, 1)
    # Seven: more than there is to do in most of them.
    for schedule, shares in enumerate((2, 7)):
        assert torch.equal(run(kernels, call.args, images, schedule, shares), alone)


def test_several_ctas_an_image_only_where_multiprocessors_are_idle() -> None:
    def chosen(batch: int, stride: int = 1, channels: int = 256, tokens: int = 49, images: int = 1) -> int:
        return PLANNED(batch, channels, tokens, stride, images, H200)

    # A task for each scheduler: 64 rows and 32 columns of one parity.
    assert [chosen(batch) for batch in (0, 1, 66, 67, 256)] == [1, 2, 2, 1, 1]
    assert [chosen(batch, 2, 128) for batch in (1, 33, 34, 66, 67)] == [4, 4, 3, 2, 1]
    assert chosen(1, 1, 20) == 1
    assert chosen(1, 1, 256, 256) == 8
    assert chosen(130, images=2) == 2


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("stage", STAGES)
def test_stages_of_lowformer(kernels: Path, stage: str, size: int) -> None:
    channels, heads, head_dim = STAGES[stage]
    stride = 2 if stage.endswith("3") else 1
    shape = {"channels": channels, "num_heads": heads, "head_dim": head_dim, "height": stride * size, "width": stride * size}
    dtype = torch.float16 if size == 7 else torch.bfloat16
    call = random_call("lowtention", stride=stride, kernel_size=2 * stride + 1, batch=3, residual=True, dtype=dtype, **shape)
    inner, tokens = heads * -(-head_dim // 16) * 16, size * size
    able = max(cuda.images_of(1000, channels, inner, tokens, H200))
    assert able == (1 if channels == 512 or (channels, size) == (384, 8) else 2)
    with settings.using({"images": able}), execution.watched(kernels) as outcome:
        result = check_call(*call, "cuda")
    assert not outcome.reports, "\n".join(outcome.reports)
    assert outcome.blocks == -(-3 // able)
    assert outcome.shared == cuda.shared_bytes(channels, inner, tokens, able)
    if able > 1:
        assert torch.equal(result, run(kernels, call.args, 1))


@pytest.mark.parametrize("norm", [True, False])
def test_nan_and_infinity_stay_in_their_image(kernels: Path, norm: bool) -> None:
    call = random_call("lowtention", batch=6, channels=20, height=5, width=7, norm=norm, dtype=torch.float16)
    clean = run(kernels, call.args, 3)
    for value in (torch.nan, torch.inf):
        x = call.args[0].clone(memory_format=torch.preserve_format)
        x[1, 3, 4, 6] = x[4, 0, 0, 0] = value
        out = run(kernels, (x, *call.args[1:]), 3)
        assert torch.equal(out[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])
        assert out[[1, 4]].isnan().all()


def test_a_neighbour_that_is_not_masked_is_noticed(on_cpu: None) -> None:
    broken = Breakage("lowtention", "lowtention.cu", "!NEIGHBOURS || j * 16 + value < live", "true", "")
    call = random_call("lowtention", batch=2, channels=20, head_dim=32, height=5, width=7, dtype=torch.float16)
    call.args[0][1, 3, 4, 6] = torch.nan
    leaking, intact = (run(variant("lowtention", breakage), call.args, 2)[0].isnan() for breakage in (broken, None))
    assert leaking.any()
    assert not intact.any()


def test_more_images_only_where_no_multiprocessor_gets_more() -> None:
    def chosen(batch: int, tokens: int = 49) -> int:
        return cuda.images_of(batch, 256, 128, tokens, H200)[0]

    assert [chosen(batch) for batch in (1, 2, 132, 133, 256, 264, 265, 528, 1024)] == [1, 1, 1, 2, 2, 2, 1, 2, 2]
    assert chosen(256, 64) == 2
    assert chosen(1024, 16) == 8
    assert chosen(256, 65) == 1
    # An A100 has less shared memory: two images of 49 tokens fit, of 64 do not.
    a100 = tiling.Device(163 * 1024, 164 * 1024, 108)
    assert cuda.images_of(216, 256, 128, 49, a100) == (2, 1)
    assert cuda.images_of(216, 256, 128, 64, a100) == (1,)


def test_candidates_of_a_tuner(kernels: Path) -> None:
    call = random_call("lowtention", channels=20, height=4, width=4, batch=3, dtype=torch.float16)
    found = [dict(contender.setting) for contender, _ in tuning.contenders(*call, ["cuda"])]
    assert found == [{}, {"images": 2}, {"images": 3}]
    for setting, blocks in (*zip(found, (3, 2, 1), strict=True), ({"images": 4}, 3), ({"images": 2, "width": 1}, 3)):
        with settings.using(setting), execution.watched(kernels) as outcome:
            check_call(*call, "cuda")
        assert not outcome.reports, "\n".join(outcome.reports)
        assert outcome.blocks == blocks


def test_images_beyond_the_shape_compiled_are_refused(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "images_of", lambda *args: (3,))
    call = random_call("lowtention", channels=20, height=7, width=7, batch=3, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="no such configuration"), execution.watched(kernels):
        execution.run("lowtention", call.args)
