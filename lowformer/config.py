"""The eight LowFormer variants: one table of sizes and published figures."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["VARIANTS", "VariantConfig", "get_config", "list_models"]

NUM_STAGES = 4
BLOCK_EXPANSION = 4
"""Channel expansion of every block that is not a stride-2 one, and of the MLP."""
FUSED_BELOW = 256
"""The local block of a LowFormer block is FusedMBConv below this width and MBConv from it on."""


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """Sizes of one LowFormer variant, and what has been published about it.

    The stem has stride 2 and each of the four stages halves its input again, so the maps have strides 2,
    4, 8, 16 and 32.

    Attributes:
        name: model name, as in timm.
        widths: channels of the stem and of stages 1 to 4.
        depths: blocks after the stem's convolution; blocks of stages 1 and 2, the stride-2 one included;
            LowFormer blocks of stages 3 and 4, their stride-2 block not included.
        down_expansion: channel expansion of the four stride-2 blocks, relative to their input width.
        attention: whether LowFormer blocks have Lowtention.
        mlp: whether they have the MLP. Without it, Lowtention has no GroupNorm in front either (E3).
        head_widths: widths of the head's 1x1 convolution and of its hidden linear layer.
        tag: timm's name of the published weights, or ``"untrained"`` where there are none.
        params_m: parameters in millions, with a 1000-class head; counted from the authors' code.
        mmacs_224: multiply-accumulates in millions for one 224x224 image; counted from the authors' code.
        top1: ImageNet-1k top-1 accuracy in percent at 224x224, from the papers (arXiv 2409.03460 for B,
            arXiv 2603.26551 for E).
        a40_images_per_s: the papers' throughput on an NVIDIA A40 in images/s (fp32, TorchScript, batch
            200), if given.
    """

    name: str
    widths: tuple[int, int, int, int, int]
    depths: tuple[int, int, int, int, int]
    down_expansion: int
    attention: bool
    mlp: bool
    head_widths: tuple[int, int]
    tag: str
    params_m: float
    mmacs_224: int
    top1: float
    a40_images_per_s: int | None

    @property
    def has_weights(self) -> bool:
        """Whether ImageNet-1k weights have been published."""
        return self.tag != "untrained"

    @property
    def hub_id(self) -> str:
        """Repository of the published weights on the Hugging Face Hub."""
        return f"timm/{self.name}.{self.tag}"


_SMALL_HEAD = (1536, 1600)
_LARGE_HEAD = (2304, 2560)

VARIANTS: dict[str, VariantConfig] = {
    config.name: config
    for config in (
        VariantConfig(
            name="lowformer_b0", widths=(16, 32, 64, 128, 256), depths=(0, 1, 1, 3, 4), down_expansion=4,
            attention=True, mlp=True, head_widths=_SMALL_HEAD, tag="in1k",
            params_m=14.10, mmacs_224=944, top1=78.4, a40_images_per_s=5988,
        ),
        VariantConfig(
            name="lowformer_b1", widths=(16, 32, 64, 128, 256), depths=(0, 1, 1, 5, 5), down_expansion=6,
            attention=True, mlp=True, head_widths=_SMALL_HEAD, tag="in1k",
            params_m=17.94, mmacs_224=1411, top1=79.9, a40_images_per_s=4237,
        ),
        VariantConfig(
            name="lowformer_b15", widths=(20, 40, 80, 160, 320), depths=(0, 1, 1, 6, 6), down_expansion=6,
            attention=True, mlp=True, head_widths=_LARGE_HEAD, tag="in1k",
            params_m=33.98, mmacs_224=2574, top1=81.2, a40_images_per_s=2739,
        ),
        VariantConfig(
            name="lowformer_b2", widths=(24, 48, 96, 192, 384), depths=(0, 1, 1, 6, 6), down_expansion=6,
            attention=True, mlp=True, head_widths=_LARGE_HEAD, tag="untrained",
            params_m=44.99, mmacs_224=3689, top1=81.6, a40_images_per_s=None,
        ),
        VariantConfig(
            name="lowformer_b3", widths=(32, 64, 128, 256, 512), depths=(1, 2, 3, 6, 6), down_expansion=6,
            attention=True, mlp=True, head_widths=_SMALL_HEAD, tag="in1k",
            params_m=57.09, mmacs_224=6099, top1=83.6, a40_images_per_s=1162,
        ),
        VariantConfig(
            name="lowformer_e1", widths=(20, 40, 80, 160, 320), depths=(0, 1, 1, 4, 4), down_expansion=6,
            attention=False, mlp=False, head_widths=_LARGE_HEAD, tag="in1k",
            params_m=18.90, mmacs_224=1348, top1=78.8, a40_images_per_s=6337,
        ),
        VariantConfig(
            name="lowformer_e2", widths=(32, 64, 128, 256, 512), depths=(1, 2, 3, 4, 4), down_expansion=6,
            attention=False, mlp=False, head_widths=_SMALL_HEAD, tag="in1k",
            params_m=22.75, mmacs_224=3789, top1=81.6, a40_images_per_s=2070,
        ),
        VariantConfig(
            name="lowformer_e3", widths=(32, 64, 128, 256, 512), depths=(1, 2, 3, 6, 6), down_expansion=6,
            attention=True, mlp=False, head_widths=_SMALL_HEAD, tag="in1k",
            params_m=41.32, mmacs_224=4866, top1=83.0, a40_images_per_s=1566,
        ),
    )
}  # fmt: skip
"""The variants by name. B2's accuracy is the papers'; its weights were never published."""


def list_models() -> list[str]:
    """Return the names that :func:`lowformer.create_model` knows."""
    return list(VARIANTS)


def get_config(name: str) -> VariantConfig:
    """Return the configuration of a variant.

    Args:
        name: a name of :func:`list_models`, with or without timm's tag (``"lowformer_b1.in1k"``).

    Raises:
        ValueError: no variant, or no published weights, of that name.
    """
    variant, _, tag = name.partition(".")
    if variant not in VARIANTS:
        raise ValueError(f"unknown model {name!r}: the models are {', '.join(VARIANTS)}")
    config = VARIANTS[variant]
    if tag and tag != config.tag:
        raise ValueError(f"unknown tag in {name!r}: {variant} has only {variant}.{config.tag}")
    return config
