"""Microbenchmarks of the operators for pytest-benchmark, for work on one kernel: quick to repeat, to sort and to compare with a
saved run. They see neither other processes nor drifts of the machine; numbers to publish come from ``python -m benchmarks``.

    pytest benchmarks --layers main -k "lowtention and batch1" --benchmark-autosave
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import plans
from benchmarks.measure import Truth
from benchmarks.provenance import cache_bytes
from benchmarks.rivals import Contender, contenders
from benchmarks.subjects import Layer, layer_subject, layers_of, lowformer_layers, mobile_layers

LAYERS: dict[str, Callable[[], list[Layer]]] = {
    "smoke": plans.smoke_layers,
    "main": lambda: layers_of(plans.MAIN_MODEL, 224),
    "all": lambda: lowformer_layers() + mobile_layers(),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    which = metafunc.config.getoption("layers")
    layers = LAYERS[which]()
    batches = (2,) if which == "smoke" else plans.LAYER_BATCHES
    light = [c for c in contenders() if c.cost == "light" and not c.name.startswith("timm")]
    metafunc.parametrize("contender", light, ids=[c.name.replace(", ", "-") for c in light])
    metafunc.parametrize("batch", batches, ids=[f"batch{b}" for b in batches])
    metafunc.parametrize("layer", layers, ids=[x.name.replace(" ", "-") for x in layers])


def test_operator(layer: Layer, batch: int, contender: Contender, benchmark: Any, request: pytest.FixtureRequest) -> None:
    device = request.config.getoption("on") or ("cuda" if torch.cuda.is_available() else "cpu")
    subject = layer_subject(layer, batch, plans.DTYPES[device][0], device, cache_bytes(device))
    absent = contender.absent(subject)
    if absent is not None:
        pytest.skip(absent)
    truth = Truth(subject)
    with torch.no_grad():
        built = contender.build(subject)
        x = built.prepare(subject.inputs[0])
        error = truth.error(built.result(built.run(x)))
        assert error.within(truth.budget), f"{contender.name} is wrong: {error}, allowed {truth.budget}"

        def call() -> None:
            built.run(x)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{layer.name}, batch {batch}"
        benchmark(call)
