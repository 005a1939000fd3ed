"""From a photograph to the input of a classifier: the evaluation preprocessing of the published weights.

Pillow is imported when an image is first handled (`pip install 'lowkernels[images]'`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "eval_transform", "load_image", "to_rgb"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue over ImageNet's training images, on a scale of 0 to 1."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue over ImageNet's training images, on a scale of 0 to 1."""

# One row of 100,000 pixels would become gigabytes when resized by its short side.
_MAX_ASPECT = 1000


def load_image(path: str | Path) -> Image:
    """Read an image file as upright 8-bit RGB (see `to_rgb`); of an animation, the first frame.

    Raises OSError where the file cannot be read, is cut off or holds no image, ValueError where its pixels
    have no defined white (see `to_rgb`), and ImportError without Pillow.
    """
    pil_image = _pillow()
    with pil_image.open(path) as image:
        return to_rgb(image)


def to_rgb(image: Image) -> Image:
    """Turn any Pillow image into upright 8-bit RGB.

    - The rotation that cameras note in the EXIF data is applied, as every viewer does. timm's evaluation does
      not do this, so a photograph that carries such a note may be classified differently there.
    - Transparent pixels are shown on white. What lies under them is arbitrary.
    - 16-bit greyscale is scaled so that 65535 is white.
    - Greyscale, palette, CMYK and the like become RGB by Pillow's own conversion.

    Raises ValueError for modes "I" and "F" (32-bit integers and floats), where no value is known to be white.
    """
    from PIL import Image as pil_image
    from PIL import ImageOps

    if image.mode in ("I", "F"):
        raise ValueError(
            f"the image has mode {image.mode!r} (32-bit pixels without a known white); "
            "convert it to 8- or 16-bit greyscale or RGB first"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64) / 257
        return pil_image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        background = pil_image.new("RGBA", foreground.size, "white")
        return pil_image.alpha_composite(background, foreground).convert("RGB")
    return image.convert("RGB")


def eval_transform(size: int = 224, crop_pct: float = 0.95) -> Callable[[Image], Tensor]:
    """Make the preprocessing that the published weights are evaluated with.

    The image becomes upright RGB (`to_rgb`), its short side is resized to `floor(size / crop_pct)` pixels
    with Pillow's bicubic filter, the central `size` x `size` pixels are cut out, scaled to 0..1 and
    normalised by ImageNet's mean and standard deviation. For an opaque 8-bit image without an EXIF rotation
    the result equals, bit for bit, that of timm's evaluation transform with the same settings.

    Args:
        size: side of the square result, in pixels, at least 1.
        crop_pct: the share of the resized short side that the crop keeps, above 0 and at most 1.

    Returns:
        A function from a Pillow image to a contiguous float32 tensor of shape (3, size, size). It raises
        ValueError for images without a known white (see `to_rgb`) or over 1000 times as long as wide.

    Raises:
        ValueError: size or crop_pct is out of its range.
        ImportError: Pillow is not installed.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
    bicubic = _pillow().Resampling.BICUBIC
    short_side = math.floor(size / crop_pct)
    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(IMAGENET_STD)[:, None, None]

    def transform(image: Image) -> Tensor:
        image = to_rgb(image)
        width, height = image.size
        if max(width, height) > _MAX_ASPECT * min(width, height):
            raise ValueError(f"{width} x {height} pixels: one side is over {_MAX_ASPECT} times the other")
        # The long side is rounded down, as torchvision's Resize does it.
        if width <= height:
            resized = (short_side, short_side * height // width)
        else:
            resized = (short_side * width // height, short_side)
        if resized != image.size:
            image = image.resize(resized, bicubic)
        left, top = (round((side - size) / 2) for side in resized)
        image = image.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(mean).div_(std)

    return transform


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'lowkernels[images]'") from error
    return Image
