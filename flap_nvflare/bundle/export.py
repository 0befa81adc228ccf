"""Writes a trained adapter as a MONAI Bundle in the layout of the model zoo.

The configs are this package's own, with the adapter's settings put in; the weights are merged.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from safetensors.torch import save

from flap_nvflare import __version__
from flap_nvflare.bundle.trained import Trained
from flap_nvflare.bundle.workflow import CONFIGS, METADATA
from flap_nvflare.data.window import Window
from flap_nvflare.sam.merged import merged_state
from flap_nvflare.sam.tuning import METHODS
from flap_nvflare.settings import SettingsError

DOCS = Path(__file__).parent / "docs"
_AS_THEY_ARE = ("multi_gpu_train.yaml", "logging.conf")
_NETWORK = ("arch", "image_size", "channels", "grey_values")  # what an inference has to know
_WINDOW = ("low", "high", "mean", "std")
_VERSIONS = {"monai": "monai", "pytorch": "torch", "numpy": "numpy"}
_RUN = "run.json"


def write_bundle(out: Path, trained: Trained, window: Window | None, window_note: str) -> None:
    """Writes the bundle, whole or not at all.

    Args:
        out: folder that does not exist yet, or is empty.
        trained: the network with its adapter.
        window: the grey window of its inference; None if each scan has its own.
        window_note: what that window is.

    Raises:
        SettingsError: if `out` holds something, or is the folder that one is in.
    """
    if not out.name or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise SettingsError(f"{out}: exists already; name a folder that does not")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as parent:
        folder = Path(parent) / "bundle"
        for name in ("configs", "docs", "models"):
            (folder / name).mkdir(parents=True)
        _write_weights(folder / "models", trained)
        _write_configs(folder / "configs", trained, window)
        _write_docs(folder, trained, window, window_note)
        folder.replace(out)


def _write_weights(folder: Path, trained: Trained) -> None:
    state = merged_state(trained.segmenter)
    torch.save(state, folder / "model.pt")
    (folder / "model.safetensors").write_bytes(save(state))
    shutil.copyfile(trained.file, folder / "adapter.safetensors")


def _write_configs(folder: Path, trained: Trained, window: Window | None) -> None:
    for name in _AS_THEY_ARE:
        shutil.copyfile(CONFIGS / name, folder / name)
    federation = trained.federation
    settings = federation.to_dict()
    train = (CONFIGS / "train.yaml").read_text(encoding="utf-8")
    passed = set(yaml.safe_load(train)["federation"]) & set(settings)
    values = {name: settings[name] for name in sorted(passed)}
    values |= {"profile": "demo", "checkpoint_sha256": trained.spec.base_sha256}
    texts = {
        "train.yaml": filled(train, values),
        "evaluate.yaml": filled(
            (CONFIGS / "evaluate.yaml").read_text(encoding="utf-8"),
            {"adapter_file": "$@bundle_root + '/models/adapter.safetensors'"},
        ),
        "inference.yaml": filled(
            (CONFIGS / "inference.yaml").read_text(encoding="utf-8"),
            {
                **{name: settings[name] for name in _NETWORK},
                "classes": federation.classes,
                **{f"window_{name}": getattr(window, name, None) for name in _WINDOW},
            },
        ),
        "metadata.json": json.dumps(described(trained, window), indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def filled(text: str, values: Mapping[str, Any]) -> str:
    """A config's text with other values in its top-level lines; comments stay.

    Raises:
        KeyError: if a name has no line of its own.
    """
    for name, value in values.items():
        listed = yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()
        line = f"{name}: {listed[1:-1]}"
        found = list(re.finditer(rf"^{name}: [^#\n]*?( *#.*)?$", text, re.MULTILINE))
        if len(found) != 1:
            raise KeyError(f"{name} has {len(found)} lines in the config")
        text = text[: found[0].start()] + line + (found[0][1] or "") + text[found[0].end() :]
    return text


def described(trained: Trained, window: Window | None) -> dict[str, Any]:
    """The bundle's metadata.json."""
    federation = trained.federation
    size = [federation.image_size] * 2
    values: dict[str, Any] = json.loads(METADATA.read_text(encoding="utf-8"))
    values |= {f"{name}_version": _version(package) for name, package in _VERSIONS.items()}
    values["required_packages_version"] = {
        name: _version(name) for name in values["required_packages_version"]
    }
    values["task"] = (
        f"Segmentation of {' and '.join(federation.class_names)} in {_scans(window)} by a "
        "fine-tuned Segment Anything Model"
    )
    values["description"] = (
        f"A Segment Anything Model ({federation.arch}) on axial slices, fine-tuned by method "
        f"{federation.method}, with a mask for each of {federation.classes} classes in place of "
        "prompts."
    )
    values["data_source"] = data_of(trained)
    values["eval_metrics"] = {"validation_mean_dice": _score(trained)}
    formats = values["network_data_format"]
    formats["inputs"]["image"] |= {
        "spatial_shape": size,
        **_format(window),
        "channel_def": dict(zip("012", _channels(federation.channels), strict=True)),
    }
    formats["outputs"]["pred"] |= {
        "num_channels": federation.classes + 1,
        "spatial_shape": size,
        "channel_def": {
            str(index): name for index, name in enumerate(("background", *federation.class_names))
        },
    }
    return values


def _scans(window: Window | None) -> str:
    """What is segmented, in words: a window is in HU."""
    return "3D scans" if window is None else "CT"


def _format(window: Window | None) -> dict[str, Any]:
    """What the network's input is, in the words of MONAI's metadata."""
    if window is None:
        return {"format": "magnitude", "modality": "MR or other", "value_range": []}
    ends = ((edge - window.mean) / window.std for edge in (window.low, window.high))
    return {"value_range": [round(end, 4) for end in ends]}


def data_of(trained: Trained) -> str:
    """What the adapter was trained on, as the description of its run says.

    Raises:
        SettingsError: if that description is damaged.
    """
    run = trained.file.parent / _RUN
    try:
        values = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
    except ValueError as error:
        raise SettingsError(f"{run}: is no JSON ({error}); restore it or take it away") from error
    said = str(values.get("data")) if isinstance(values, dict) else ""
    return {
        # One such site makes a run so; the others may have had patients' scans.
        "synthetic": "synthetic scans drawn from a seed by flap_nvflare, at one site or at all",
        "sites' own": "scans of the sites of a federation, which stay with them",
    }.get(said, "not stated by the adapter's file")


def _score(trained: Trained) -> float | None:
    """Mean validation Dice in the adapter's file; None if it holds none."""
    score = trained.extra.get("score")
    return score if isinstance(score, float) and 0 <= score <= 1 else None


def _channels(channels: str) -> tuple[str, str, str]:
    if channels == "neighbours":
        return "the slice before", "the slice", "the slice after"
    return "the slice", "the slice", "the slice"


def _version(package: str) -> str:
    if package == "flap_nvflare":  # perhaps run from its sources
        return __version__
    return metadata.version(package).split("+")[0]  # without what it was built for


def _grey_note(window: Window | None, window_note: str) -> str:
    if window is None:
        return (
            "each scan scaled by itself. Of its voxels above the lowest tenth of the range between "
            "its own 2 and 98 percentiles, the 0.5 and 99.5 percentiles are what it is clipped to, "
            "and mean and deviation after that what it is z-scored by. Nothing has to be put in."
        )
    return (
        f"slices in HU, clipped to [{window.low:g}, {window.high:g}], then (HU - {window.mean:g}) "
        f"/ {window.std:g}. This window: {window_note}. It stands in `configs/inference.yaml` as "
        "`window_low`, `window_high`, `window_mean` and `window_std`; put in that of the site "
        "whose scans you segment."
    )


def _write_docs(folder: Path, trained: Trained, window: Window | None, window_note: str) -> None:
    shutil.copyfile(DOCS / "LICENSE", folder / "LICENSE")
    federation, data = trained.federation, data_of(trained)
    names = ("background", *federation.class_names)
    lora, score = METHODS[federation.method].lora, _score(trained)
    values = {
        **{name: getattr(federation, name) for name in ("arch", "image_size", "method", "rule")},
        "class_list": " and ".join(federation.class_names),
        "rank_note": f", rank {federation.rank}" if lora else "",
        "merged_note": "The adapters are merged into the weights: nothing low-rank is left at run "
        "time. "
        if lora
        else "",
        "data": data,
        "base_sha256": trained.spec.base_sha256,
        "base_note": " (random weights)" if federation.base == "random" else "",
        "channels": ", ".join(_channels(federation.channels)),
        "scans": _scans(window),
        "grey_note": _grey_note(window, window_note),
        "channel_count": len(names),
        "channel_list": ", ".join(f"{index} {name}" for index, name in enumerate(names)),
        "performance": "Not stated by the adapter's file: evaluate it on your own test cases."
        if score is None
        else f"Mean Dice over the validation cases of the sites: {score:.3f} ({data}). No figure "
        "of test cases is part of the file.",
        "checkpoint_note": ""
        if federation.arch == "vit_t" or federation.base == "random"
        else " (set FLAP_SAM_CHECKPOINT to the file of SAM's weights, or give --checkpoint FILE)",
    }
    for name in ("README.md", "data_license.txt"):
        text = Template((DOCS / name).read_text(encoding="utf-8")).substitute(values)
        (folder / "docs" / name).write_text(text, encoding="utf-8")
