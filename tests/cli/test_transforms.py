from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lowformer.transforms import eval_transform, load_image, to_rgb
from tests.torchvision_stub import install


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def timm_transform(image: Image.Image, size: int, crop_pct: float) -> torch.Tensor:
    install()
    from timm.data import create_transform

    transform = create_transform((3, size, size), is_training=False, interpolation="bicubic", crop_pct=crop_pct, crop_mode="center")
    return transform(image.convert("RGB"))


@pytest.mark.parametrize("size", [64, 224, 256, 384])
def test_photo_is_prepared_as_timm_does(photo: Path, size: int) -> None:
    image = Image.open(photo)
    ours = eval_transform(size)(image)
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert torch.equal(ours, timm_transform(image, size, 0.95))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.integers(1, 96),
    crop_pct=st.sampled_from([0.875, 0.9, 0.95, 1.0]),
)
def test_any_shape_is_prepared_as_timm_does(width: int, height: int, size: int, crop_pct: float) -> None:
    image = noise(width, height)
    assert torch.equal(eval_transform(size, crop_pct)(image), timm_transform(image, size, crop_pct))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_are_prepared_as_timm_does(photo: Path, mode: str) -> None:
    image = Image.open(photo).convert(mode)
    assert torch.equal(eval_transform(96)(image), timm_transform(image, 96, 0.95))


# The pixels as stored, turned into what the EXIF 2.3 specification says the viewer shall see.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    image = noise(7, 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert np.array_equal(np.asarray(loaded), UPRIGHT[orientation](np.asarray(image)))
    # Once upright, it stays so.
    assert np.array_equal(np.asarray(to_rgb(loaded)), np.asarray(loaded))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path: Path, mode: str) -> None:
    grey = np.full((2, 2), 90, np.uint8)
    alpha = np.array([[0, 255], [255, 0]], np.uint8)
    if mode == "P":
        image = Image.fromarray((alpha == 0).astype(np.uint8))
        image.putpalette([90, 90, 90, 17, 17, 17])
        image.save(tmp_path / "image.png", transparency=1)
    else:
        Image.merge(mode, [Image.fromarray(channel) for channel in [grey] * (len(mode) - 1) + [alpha]]).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as reopened:
        assert reopened.mode == mode
    shown = np.asarray(load_image(tmp_path / "image.png"))
    assert np.array_equal(shown, np.repeat(np.where(alpha == 0, 255, 90)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greyscale_spans_black_to_white(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535, 100, 200, 65535 - 100, 65535 - 200]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"grey.{suffix}")
    shown = np.asarray(load_image(tmp_path / f"grey.{suffix}"))
    assert shown[0, :, 0].tolist() == [0, 1, 128, 255, 0, 1, 255, 254]
    assert (shown == shown[:, :, :1]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_white_are_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match="without a known white"):
        to_rgb(Image.fromarray(np.zeros((2, 2), dtype)))


def test_animations_show_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(tmp_path / "two.gif"))[0, 0].tolist() == [255, 0, 0]


def test_extremely_long_images_are_refused_before_they_fill_the_memory() -> None:
    with pytest.raises(ValueError, match="1 x 100000 pixels"):
        eval_transform()(Image.new("RGB", (1, 100_000)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"crop_pct": 0.0}, "crop_pct must be above 0 and at most 1, got 0.0"),
        ({"crop_pct": 1.5}, "crop_pct must be above 0 and at most 1, got 1.5"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eval_transform(**arguments)  # type: ignore[arg-type]
