"""The models of other libraries that accelerate() is measured by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Entry:
    """A model and what becomes of it.

    Attributes:
        family: what users call it.
        source: ``timm``, ``torchvision`` or ``lowformer``.
        name: its name there.
        replaced: how many modules are replaced, by kind.
        size: side of the images its test uses.
    """

    family: str
    source: str
    name: str
    replaced: dict[str, int]
    size: int = 64

    def build(self) -> nn.Module:
        if self.source == "timm":
            import timm

            model: nn.Module = timm.create_model(self.name)
        elif self.source == "torchvision":
            import torchvision

            model = getattr(torchvision.models, self.name)()
        else:
            import lowformer

            model = lowformer.create_model(self.name, kernels="eager")
        return model


ZOO = (
    Entry(
        "LowFormer (this project)",
        "lowformer",
        "lowformer_b1",
        {"conv_act": 4, "fused_mbconv": 9, "gn_mlp": 10, "lowtention": 10, "mbconv": 5},
    ),
    Entry(
        "LowFormer (timm)", "timm", "lowformer_b1", {"conv_act": 4, "fused_mbconv": 9, "gn_mlp": 10, "lowtention": 10, "mbconv": 5}
    ),
    Entry(
        "LowFormer without GroupNorm (timm)",
        "timm",
        "lowformer_e3",
        {"conv_act": 4, "fused_mbconv": 8, "lowtention": 12, "mbconv": 12},
    ),
    Entry("EfficientNet (timm)", "timm", "efficientnet_b0", {"BatchNormAct2d": 49, "conv_act": 1}),
    Entry(
        "EfficientNet-Lite (timm)",
        "timm",
        "efficientnet_lite0",
        {"BatchNormAct2d": 2, "conv_act": 1, "mbconv": 15, "separable_conv": 1},
    ),
    Entry(
        "EfficientNetV2, TensorFlow padding (timm)",
        "timm",
        "tf_efficientnetv2_b0",
        {"BatchNormAct2d": 49, "conv_act": 2, "fused_mbconv": 2},
    ),
    Entry(
        "EfficientNetV2 (torchvision)", "torchvision", "efficientnet_v2_s", {"BatchNorm2d": 30, "conv_act": 65, "fused_mbconv": 8}
    ),
    Entry("MobileNetV2 (timm)", "timm", "mobilenetv2_100", {"BatchNormAct2d": 2, "conv_act": 1, "mbconv": 16, "separable_conv": 1}),
    Entry("MobileNetV2 (torchvision)", "torchvision", "mobilenet_v2", {"conv_act": 3, "mbconv": 16, "separable_conv": 1}),
    Entry(
        "MobileNetV3 (timm)",
        "timm",
        "mobilenetv3_large_100",
        {"BatchNormAct2d": 25, "conv_act": 2, "mbconv": 6, "separable_conv": 1},
    ),
    Entry(
        "MobileNetV3 (torchvision)",
        "torchvision",
        "mobilenet_v3_large",
        {"BatchNorm2d": 8, "conv_act": 20, "mbconv": 6, "separable_conv": 1},
    ),
    Entry("MNASNet (timm)", "timm", "mnasnet_100", {"BatchNormAct2d": 2, "conv_act": 1, "mbconv": 16, "separable_conv": 1}),
    Entry("MNASNet (torchvision)", "torchvision", "mnasnet0_5", {"BatchNorm2d": 4, "conv_act": 1, "mbconv": 16}),
    Entry("FBNet (timm)", "timm", "fbnetc_100", {"BatchNormAct2d": 2, "conv_act": 1, "mbconv": 21}),
    Entry("TinyNet (timm)", "timm", "tinynet_a", {"BatchNormAct2d": 58, "conv_act": 1}),
    Entry("MixNet (timm)", "timm", "mixnet_s", {"BatchNormAct2d": 13, "conv_act": 1, "separable_conv": 1}),
    Entry("EfficientViT (timm)", "timm", "efficientvit_b0", {"conv_act": 8, "mbconv": 10, "separable_conv": 1}),
    Entry("CPUBone (timm)", "timm", "cpubone_nano", {"BatchNorm2d": 10, "conv_act": 11, "gn_mlp": 3}),
    Entry("ConvNeXt (timm)", "timm", "convnext_atto", {"conv_act": 1, "fused_mbconv": 12}),
    Entry("ResNet (timm)", "timm", "resnet18", {"BatchNorm2d": 17, "conv_act": 4}),
    Entry("ViT (timm)", "timm", "vit_tiny_patch16_224", {}, size=224),
)
