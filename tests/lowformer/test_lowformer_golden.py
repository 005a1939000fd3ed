"""The model against outputs of the authors' code in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.lowformer.helpers import KERNELS, VARIANTS, golden, golden_cases, images, reference_model

TOLERANCE = 1e-9


def test_every_variant_has_a_case() -> None:
    assert {name for name, _ in golden_cases()} == set(VARIANTS)
    assert len(golden_cases()) == 12


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("name", "case"), golden_cases())
def test_logits_and_every_stage_match(name: str, case: str, kernels: str) -> None:
    expected = golden(name, case)
    model = reference_model(name, kernels)
    stages: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        stages.append(output)

    for part in (model.stem, *model.stages):
        part.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(images(*expected["case"]))

    assert len(stages) == 5
    for i, stage in enumerate(stages):
        got = stage.numpy()
        assert got.shape == tuple(expected[f"stage{i}_shape"])
        close(got.mean((2, 3)), expected[f"stage{i}_mean_c"])
        close(got.std((1, 2, 3), ddof=1), expected[f"stage{i}_std"])
        close(got[:, :8, -2:, -2:], expected[f"stage{i}_corner"])
    close(logits.numpy(), expected["logits"])


def close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE
