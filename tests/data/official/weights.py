"""Deterministic weights for LowFormer state dicts in the authors' key layout.

`state_dict(shapes)` maps `{key: shape}` to numpy float64 arrays. Every value depends only on its key and
shape, so the same weights can be made anywhere without shipping them. Norm scales and running variances are
positive; conv and linear weights are scaled by fan-in, and those that end a residual branch are smaller, so
that activations keep an O(1) scale through the network as they do in a trained one.
"""

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        return rng.uniform(0.6, 1.4, shape)
    if key.endswith("running_mean"):
        return rng.normal(0.0, 0.1, shape)
    if len(shape) == 1:
        return rng.uniform(0.8, 1.2, shape) if key.endswith("weight") else rng.normal(0.0, 0.1, shape)
    fan_in = int(np.prod(shape[1:]))
    # transposed conv, (in, out, k, k): an output pixel sees (k / stride)^2 taps of every input channel
    if ".upsampling." in key:
        fan_in = shape[0] * (4 if shape[-1] == 4 else 9)
    return rng.normal(0.0, gain(key) / np.sqrt(fan_in), shape)


def gain(key: str) -> float:
    """1 to 1.4 where nothing bypasses the layer, 0.35 where it ends a residual branch, 0.7 for q, k and v."""
    if ".pwise." in key:
        return 0.7
    if not re.search(r"point_conv|upsampling|main\.3\.", key):
        return 1.4
    bypassed = re.search(r"\.total\.|input_stem\.op_list\.[1-9]|stages\.[01]\.op_list\.[1-9]", key)
    return 0.35 if bypassed else 1.0


def image(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random test images, float64, (batch, 3, height, width), roughly zero mean and unit variance."""
    rng = np.random.Generator(np.random.PCG64(1000 + seed))
    coarse = rng.normal(size=(batch, 3, -(-height // 8), -(-width // 8)))
    smooth = coarse.repeat(8, axis=2).repeat(8, axis=3)[:, :, :height, :width]
    return 0.7 * smooth + 0.7 * rng.normal(size=(batch, 3, height, width))


def state_dict(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    return {key: tensor(key, tuple(shape)) for key, shape in shapes.items()}
