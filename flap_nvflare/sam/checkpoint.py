"""Reads SAM's published weights and fits them to another image size.

Files are safetensors, or the published `.pth` layout read without running any pickled code. A
file that cannot be the asked-for model stops with a `CheckpointError` that says what to do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from flap_nvflare.sam.backbone import ARCHITECTURES, Architecture, StockSam

PACKAGED = Path(__file__).parent / "weights" / "vit_t.safetensors"
PUBLISHED = {
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or another model's; the message names file and mend."""


class MissingCheckpointError(CheckpointError):
    """There is no file of the weights."""


def read_checkpoint(path: Path | str, arch: Architecture) -> tuple[dict[str, Tensor], str]:
    """Reads a file of SAM weights at its own image size.

    Args:
        path: `.safetensors` or the published `.pth` file.
        arch: the model the file should hold.

    Returns:
        float32 tensors under the official names, and the SHA-256 of the file.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds something else than `arch`.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingCheckpointError(f"{path}: there is no such file; {_mend(arch)}")
    state = load_tensors(path, _mend(arch))
    _check(path, state, arch)
    return {name: tensor.float() for name, tensor in state.items()}, file_sha256(path)


def recognise_checkpoint(path: Path | str) -> str:
    """Name of the architecture whose weights a file holds, all of them.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds none of `ARCHITECTURES`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; {_mend(ARCHITECTURES['vit_b'])}")
    state = load_tensors(path, _mend(ARCHITECTURES["vit_b"]))
    found = _recognise(state)
    for arch in ARCHITECTURES.values():
        if found == (arch.embed_dim, arch.depth):
            _check(path, state, arch)
            return arch.name
    raise CheckpointError(f"{path}: holds no SAM encoder; {_mend(ARCHITECTURES['vit_b'])}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fit_tables(
    state: Mapping[str, Tensor], arch: Architecture, image_size: int
) -> dict[str, Tensor]:
    """The same weights with the position tables resized to the grid of `image_size`.

    The absolute table is resized bilinearly, the relative tables of the global blocks linearly
    (their length is 2 grid - 1); the windows keep theirs. At the native size nothing changes.
    """
    grid = arch.grid(image_size)
    fitted = dict(state)
    name = "image_encoder.pos_embed"
    if fitted[name].shape[1] != grid:
        table = fitted[name].permute(0, 3, 1, 2)
        table = functional.interpolate(table, (grid, grid), mode="bilinear", align_corners=False)
        fitted[name] = table.permute(0, 2, 3, 1).contiguous()
    for block in arch.global_blocks:
        for axis in ("h", "w"):
            name = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            if fitted[name].shape[0] != 2 * grid - 1:
                table = functional.interpolate(
                    fitted[name].T[None], 2 * grid - 1, mode="linear", align_corners=False
                )
                fitted[name] = table[0].T.contiguous()
    return fitted


def load_tensors(path: Path, mend: str) -> dict[str, Tensor]:
    """Named tensors of a `.safetensors` file, or of one that torch wrote.

    Args:
        path: the file; nothing in it is run.
        mend: what to do about another file, for the error.

    Raises:
        CheckpointError: if it can't be read or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the readers raise nearly anything
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path}: is no readable file of weights: it is damaged, cut short, or holds more than "
            f"tensors ({type(error).__name__}: {reason}); {mend}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()
    ):
        raise CheckpointError(f"{path}: holds no table of named tensors; {mend}")
    return state


def _check(path: Path, state: Mapping[str, Tensor], arch: Architecture) -> None:
    """Names, shapes (image size aside) and finite values, against the stock model."""
    found = _recognise(state)
    if found is not None and found != (arch.embed_dim, arch.depth):
        known = {(a.embed_dim, a.depth): name for name, a in ARCHITECTURES.items()}
        name = known.get(found, f"a model of width {found[0]} and {found[1]} blocks")
        raise CheckpointError(f"{path}: holds {name}, not {arch.name}; {_mend(arch)}")
    with torch.device("meta"):
        expected = StockSam(arch).state_dict()
    missing = sorted(set(expected) - set(state))
    unknown = sorted(set(state) - set(expected))
    for keys, what in ((missing, "lacks"), (unknown, "is not {0}'s: has the unknown")):
        if keys:
            said = what.format(arch.name)
            raise CheckpointError(
                f"{path}: {said} {keys[0]!r} ({len(keys)} such keys); {_mend(arch)}"
            )
    resizable = _resizable(arch)
    for name, tensor in state.items():
        wanted = expected[name].shape
        fits = resizable.fullmatch(name) and _is_table(tensor.shape, wanted)
        if tensor.shape != wanted and not fits:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tuple(tensor.shape)}, {arch.name} has "
                f"{tuple(wanted)}; {_mend(arch)}"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: {name!r} holds values that are no finite numbers; {_mend(arch)}"
            )


def _is_table(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a position table differs from the wanted one by the side of its grid alone."""
    if len(shape) != len(wanted) or shape[-1] != wanted[-1] or 0 in shape:
        return False
    if len(shape) == 2:  # relative positions: 2 grid - 1 rows
        return shape[0] % 2 == 1
    return shape[0] == 1 and shape[1] == shape[2]


def _resizable(arch: Architecture) -> re.Pattern[str]:
    blocks = "|".join(map(str, arch.global_blocks))
    return re.compile(rf"image_encoder\.(pos_embed|blocks\.({blocks})\.attn\.rel_pos_[hw])")


def _recognise(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Width and number of blocks of the encoder, or None if there is none."""
    weight = state.get("image_encoder.patch_embed.proj.weight")
    blocks = {name.split(".")[2] for name in state if name.startswith("image_encoder.blocks.")}
    return (
        None if weight is None or not weight.ndim or not blocks else (weight.shape[0], len(blocks))
    )


def _mend(arch: Architecture) -> str:
    if arch.name == "vit_t":
        return "name no checkpoint to use the packaged one, or reinstall the package"
    file = PUBLISHED.get(arch.name, f"file of {arch.name}")
    return (
        f"download {file} again from https://github.com/facebookresearch/segment-anything and name "
        "it in FLAP_SAM_CHECKPOINT or in the site's `checkpoint`"
    )
