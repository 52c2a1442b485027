"""torchvision's own models, where it is installed (it is no dependency, not even of the tests)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch

import meristem as ms

pytestmark = pytest.mark.slow
MODELS = [
    "resnet18",
    "mobilenet_v2",
    "densenet121",
    "vgg11_bn",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_400mf",
]


@pytest.fixture(scope="module")
def models() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        importlib.import_module("torchvision")
    except (
        RuntimeError
    ):  # its extension does not load: then its operators need their schemas declared
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    return pytest.importorskip("torchvision.models")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_axes_of_torchvision_models_grow_exactly(models: Any, name: str) -> None:
    model = getattr(models, name)(num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    axes = ms.find_axes(model, x)
    assert len(axes) >= 5
    chosen = list(axes.values())[:: max(1, len(axes) // 4)]
    for axis in chosen:
        assert ms.grow_(model, {axis.name: 3 * axis.multiple}, x).max_change <= 1e-5
