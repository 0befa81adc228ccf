"""Networks of a site's own, as their YAML files say, and the settings that go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMED = ("model.2.*",)
SETTINGS: dict[str, Any] = {
    "arch": "bundle",
    "base": "random",
    "method": "named",
    "parameters": list(NAMED),
    "rule": "mean",
    "image_size": 32,
    "rounds": 2,
    "batch_size": 4,
    "validation_fraction": 0.34,
    "seed": 3,
}
UNET = """\
network_def:
  _target_: monai.networks.nets.UNet
  spatial_dims: 2
  in_channels: 3
  out_channels: "$@federation.classes + 1"
  channels: [4, 8, 16]
  strides: [2, 2]
  norm: batch  # keeps running statistics
"""


def write_unet(folder: Path, before: str = "", after: str = "", more: str = "") -> Path:
    """The file, changed at one place."""
    assert before in UNET
    path = folder / "unet.yaml"
    path.write_text(UNET.replace(before, after) + more, encoding="utf-8")
    return path
