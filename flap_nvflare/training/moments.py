"""AdamW's moments on disk: what a site must remember from one round to the next.

Saved by parameter name, so that a file fits any optimiser over the same parameters in
whatever order. After an aggregation that turns the basis of the low-rank factors (for
instance the cut of the mean product by SVD), a factor's old moments point along axes that
are no longer there; they are dropped, the others are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flap_nvflare.adapter.factors import LORA_A, LORA_B
from flap_nvflare.adapter.update import write_atomic
from flap_nvflare.training.errors import StateError

FORMAT = "flap_nvflare.adamw.1"
_KINDS = ("exp_avg", "exp_avg_sq", "step")


def save_moments(
    path: Path | str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    """Writes both moments and the step count of every parameter that has been stepped.

    The file is there whole or not at all: written beside, synced, then renamed.

    Args:
        path: safetensors file; its folder is made.
        optimizer: an AdamW over `parameters`.
        parameters: trained parameters by name.
    """
    tensors = {
        f"{kind}/{name}": state[kind].detach().float().cpu().contiguous()
        for name, parameter in sorted(parameters.items())
        if (state := optimizer.state.get(parameter))
        for kind in _KINDS
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(tensors, metadata={"format": FORMAT}))


def load_moments(
    path: Path | str,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    reset_factors: bool,
) -> None:
    """Puts saved moments into `optimizer`; a parameter without any starts afresh.

    Args:
        path: file of `save_moments`.
        optimizer: an AdamW over `parameters`.
        parameters: trained parameters by name.
        reset_factors: drop the moments of the low-rank factors, whose basis has turned.

    Raises:
        StateError: if the file is missing, damaged, of another kind, or names a parameter
            that is not trained here or has another shape. The optimiser is then untouched.
    """
    saved = _read(Path(path))
    fresh: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in saved.items():
        kind, _, name = key.partition("/")
        if kind not in _KINDS or name not in parameters:
            raise StateError(f"{path}: {key} belongs to no parameter trained here; delete the file")
        wanted = torch.Size([]) if kind == "step" else parameters[name].shape
        if tensor.shape != wanted:
            raise StateError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, expected {tuple(wanted)}; "
                f"it was written for another model, delete the file"
            )
        fresh.setdefault(name, {})[kind] = tensor
    halves = sorted(name for name, state in fresh.items() if len(state) != len(_KINDS))
    if halves:
        raise StateError(f"{path}: {halves[0]} lacks one of {_KINDS}; delete the file")
    optimizer.state.clear()
    for name, state in fresh.items():
        if reset_factors and name.endswith((LORA_A, LORA_B)):
            continue
        parameter = parameters[name]
        optimizer.state[parameter] = {
            # AdamW counts on the CPU wherever the parameter lives. Moments lie in memory as
            # their parameter does: the fused step walks over all three in order of storage.
            kind: tensor.clone() if kind == "step" else torch.empty_like(parameter).copy_(tensor)
            for kind, tensor in state.items()
        }


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise StateError(f"{path}: not a file of optimiser moments ({FORMAT})")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path}: cannot be read: {error}; delete the file") from error
