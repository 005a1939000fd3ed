"""What the tests of this folder share: reference data, models with known weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lowformer
from tests.data.official import weights

OFFICIAL = Path(__file__).parents[1] / "data" / "official"
KERNELS = ["eager", "auto"]
VARIANTS = lowformer.list_models()


def authors_name(name: str) -> str:
    """The name of a model's reference files: b0, b15, E1."""
    variant = name.removeprefix("lowformer_")
    return variant.upper() if variant.startswith("e") else variant


@cache
def authors_shapes(name: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = json.loads((OFFICIAL / f"{authors_name(name)}.json").read_text())
    return shapes


def authors_state(name: str) -> dict[str, Tensor]:
    """The reference weights, under the authors' names, in float64."""
    return {key: torch.as_tensor(value) for key, value in weights.state_dict(authors_shapes(name)).items()}


def reference_model(name: str, kernels: str, dtype: torch.dtype = torch.float64) -> lowformer.LowFormer:
    """A model in eval mode with the reference weights."""
    model = lowformer.create_model(name, kernels=kernels).to(dtype)
    lowformer.load_checkpoint(model, authors_state(name))
    return model.eval()


def images(batch: int, height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(weights.image(batch, height, width, seed)).to(dtype)


def golden_cases() -> list[tuple[str, str]]:
    """(model name, case) of every reference file."""
    return [
        (name, path.stem.split("_", 1)[1]) for name in VARIANTS for path in sorted(OFFICIAL.glob(f"{authors_name(name)}_*.npz"))
    ]


def golden(name: str, case: str) -> dict[str, np.ndarray]:
    with np.load(OFFICIAL / f"{authors_name(name)}_{case}.npz") as data:
        return dict(data)


def small_model(name: str = "lowformer_b0", seed: int = 0, **arguments: object) -> lowformer.LowFormer:
    """A freshly initialised eager model whose BatchNorm statistics are not the trivial 0 and 1."""
    torch.manual_seed(seed)
    model = lowformer.create_model(name, kernels="eager", **arguments)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.6, 1.4)
    return model
