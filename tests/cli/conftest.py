from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lowformer

TABBY = 281


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the photograph in the package."""
    copy = tmp_path_factory.mktemp("photo") / "cat.jpg"
    with as_file(files("lowkernels").joinpath("data", "chelsea.jpg")) as original:
        shutil.copyfile(original, copy)
    return copy


@pytest.fixture(scope="session")
def tabby_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of lowformer_b0 that calls everything a tabby, with a probability near 1."""
    torch.manual_seed(1)
    state = lowformer.create_model("lowformer_b0", kernels="eager").state_dict()
    state["classifier.bias"][TABBY] = 30.0
    path = tmp_path_factory.mktemp("weights") / "tabby.safetensors"
    save_file(state, path)
    return path
