"""Every shipped configuration compiles for sm_80 and sm_90 without spills, within shared memory, to matrix instructions."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton package is not installed")

from lowkernels.backends.triton import aot, configs, layers
from lowkernels.ops import OPERATORS

PERF = Path(__file__).parents[2] / "docs" / "perf"
# bfloat16 shares the rows of float16; the table under docs/perf covers it.
DTYPES = {80: ["float16"], 90: ["float16", "tf32", "float32"]}
SHARES = 6


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_shipped_configurations_compile(share: int) -> None:
    """Divided so that parallel runs share the work."""
    jobs = [job for arch, dtypes in DTYPES.items() for job in aot.shipped_jobs(arch, dtypes)]
    checks = [found for job in jobs[share::SHARES] for found in aot.check(job)]
    assert checks
    assert not [f"{found.job} {found.kernel} {found.tiles}: {found.problem}" for found in checks if found.problem]


def test_every_row_is_launched() -> None:
    """A row no LowFormer layer uses is not proven, so it does not ship."""
    for arch in (80, 90):
        dtypes = list(aot.DTYPES)
        launched = {(job.layer[0], launch.config["row"]) for job in aot.shipped_jobs(arch, dtypes) for launch in aot.planned(job)}
        for operator in OPERATORS:
            rows = configs.table(operator)
            meant = {number for number, row in enumerate(rows) if any(configs.serves(row, arch, dtype) for dtype in dtypes)}
            assert {number for name, number in launched if name == operator and number >= 0} == meant, (operator, arch)


def test_spills_are_found() -> None:
    """The check itself: a tile far too large for the registers of a few threads."""
    layer = next(layer for layer in layers.layers(224, ["lowformer_b0"]) if layer[0] == "fused_mbconv")
    job = aot.Job(layer, 256, "float16", 80)
    (launch,) = aot.planned(job)
    constants = {**launch.constants, "BM": 256, "BE": 128}
    huge = aot.Launch(launch.kernel, launch.grid, launch.args, constants, {**launch.config, "num_warps": 4})
    resources = aot.compile_launch(huge, 80)
    assert resources.spills > 0
    assert "spills" in aot.problem(huge, resources, job)


def test_one_launch_up_to_256_pixels_and_at_most_three_beyond() -> None:
    for size, allowed in ((224, 1), (256, 1), (512, 3), (1024, 3)):
        for layer in layers.layers(size):
            launches = aot.planned(aot.Job(layer, 2, "float16", 90))
            assert 1 <= len(launches) <= allowed, (size, layers.name(layer))


def test_table_is_up_to_date() -> None:
    text = (PERF / "triton_resources.md").read_text()
    fresh = aot.HASH_LINE.format(aot.source_hash())
    assert fresh in text, "run: python -m lowkernels.backends.triton.aot --arch all --write docs/perf/triton_resources.md"
