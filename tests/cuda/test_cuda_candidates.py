"""The divisions a tuner tries are right under the shim, and settings that do not fit a call are ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowkernels.backends.cuda import launch, tiling
from lowkernels.choosing import settings, tuning
from lowkernels.testing import check_call, random_call
from tests.cuda import execution

SHAPE = tiling.Shape(8, 64, 14, 14, 64, 3, 1, 1, 256, False)


@pytest.mark.parametrize("operator", ["separable_conv", "mbconv"])
def test_candidates_are_right(kernels: Path, operator: str) -> None:
    call = random_call(operator, channels=24, hidden=40, out_channels=40, height=7, width=8, batch=3, dtype=torch.float16)
    found = list(tuning.contenders(*call, ["cuda"]))
    assert len({tuple(contender.setting.items()) for contender, _ in found}) == len(found) > 3
    for contender, _ in found:
        with settings.using(contender.setting), execution.watched(kernels) as outcome:
            check_call(*call, "cuda")
        assert not outcome.reports, "\n".join(outcome.reports)


def test_candidates_fit_and_differ_from_the_choice() -> None:
    for device in (tiling.SMALLEST, tiling.Device(227 * 1024, 228 * 1024, 132)):
        tiles = [tiling.Tile(**tried) for tried in tiling.candidates(SHAPE, device)]
        assert len(set(tiles)) == len(tiles) > 3
        assert tiling.choose(SHAPE, device) not in tiles
        assert all(tiling.shared_bytes(SHAPE, tile) <= device.shared for tile in tiles)
        assert all(tiling.asked_for(SHAPE, device, tile._asdict()) == tile for tile in tiles)


def test_settings_that_do_not_fit_are_ignored() -> None:
    x = torch.empty(8, 64, 14, 14, dtype=torch.float16)
    chosen = tiling.choose(SHAPE, tiling.SMALLEST)
    (other, *_) = tiling.candidates(SHAPE, tiling.SMALLEST)
    with settings.using(other):
        assert launch.tile_for(SHAPE, x) == tiling.Tile(**other) != chosen
    for wrong in ({}, {"BM": 64}, {**other, "height": 15}, {**other, "config": 99}, {**other, "images": 9}, {**other, "more": 1}):
        with settings.using(wrong):
            assert launch.tile_for(SHAPE, x) == chosen
