"""The models of the zoo: by name, what makes one with an example of its call."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from architectures import ARCHITECTURES
from families import FAMILIES
from styles import STYLES
from torch import nn

CLASSIFIERS = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vit_b_16",
    "wide_resnet50_2",
]
"""One of each size of torchvision's classification models."""
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_b_16": 224}
Made = tuple[nn.Module, Any]


def prepare_torchvision() -> None:
    """Where its extension does not load, its operators need their schemas declared."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
        _LIBRARIES.append(library)
        importlib.import_module("torchvision")


# A library that is let go takes its schemas along.
_LIBRARIES: list[torch.library.Library] = []


def _torchvision(name: str) -> Made:
    prepare_torchvision()
    models = importlib.import_module("torchvision.models")
    size = SIZES.get(name, 64)
    return getattr(models, name)(num_classes=10), torch.randn(2, 3, size, size)


def _timm(name: str) -> Made:
    prepare_torchvision()
    timm = importlib.import_module("timm")
    model = timm.create_model(name, num_classes=10)
    channels, height, width = model.default_cfg["input_size"]
    # Local attention cuts images into windows: such models want the size that they were made for.
    windows = any(part in name for part in ("halo", "nextvit", "maxvit", "coatnet"))
    if (
        not model.default_cfg.get("fixed_input_size", False)
        and height > 128
        and not windows
    ):
        height = width = 96
    return model, torch.randn(2, channels, height, width)


def _style(name: str) -> Made:
    return STYLES[name]()


def _transformer(name: str) -> Made:
    if importlib.util.find_spec("torchvision") is not None:
        prepare_torchvision()  # transformers imports it where it is there
    return ARCHITECTURES[name]()


SOURCES: dict[str, tuple[list[str], Callable[[str], Made], str]] = {
    "styles": (list(STYLES), _style, "torch"),
    "torchvision": (CLASSIFIERS, _torchvision, "torchvision"),
    "transformers": (list(ARCHITECTURES), _transformer, "transformers"),
    "timm": (FAMILIES, _timm, "timm"),
}
"""By source: its models, what makes one, and the package that it needs."""


def names() -> list[str]:
    """The models of every source whose package is there."""
    found = []
    for source, (listed, _, package) in SOURCES.items():
        if importlib.util.find_spec(package) is not None:
            found += [f"{source}/{name}" for name in listed]
    return found


def make(name: str) -> Made:
    """A model, with random weights, and an example of its call."""
    source, _, rest = name.partition("/")
    return SOURCES[source][1](rest)
