"""Named tensors in a safetensors file on the site's disk, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flap_nvflare.adapter.update import write_atomic
from flap_nvflare.training.errors import StateError

_KEY = "flap_state"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], format: str, said: str = "") -> None:
    """Writes tensors by sorted name; equal content gives equal bytes.

    Args:
        path: file to write or replace; its folder is made.
        tensors: by name, wherever they live.
        format: what the file is, to be told from others.
        said: a text to keep beside them.
    """
    dense = {name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry, since safetensors keeps several in no fixed order.
    write_atomic(path, save(dense, {_KEY: json.dumps([format, said])}))


def read_tensors(path: Path, format: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by sorted name, and the text beside them.

    Raises:
        StateError: if the file is missing, damaged, or of another format.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            found = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if not isinstance(found, list) or len(found) != 2 or found[0] != format:
                raise StateError(f"{path}: not a file of {format}; delete it")
            tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise StateError(f"{path}: cannot be read: {error}; delete the file") from error
    return tensors, str(found[1])
