"""What comes from the server, checked against what this site expects, and made its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flap_nvflare.adapter.factors import of_rank
from flap_nvflare.adapter.guard import DEFAULT_LIMITS, total_norm
from flap_nvflare.adapter.update import UpdateError
from flap_nvflare.training.work import SiteWork


def own_share(work: SiteWork, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shared adapter at this site's rank, float32.

    Of a larger rank the site has the first rows of A and columns of B: with balanced factors they
    carry the largest singular values of the product.

    Raises:
        UpdateError: if names or shapes are not those of `SiteWork.spec_down`.
    """
    expected = work.spec_down().shapes
    for name in sorted(tensors.keys() ^ expected.keys()):
        fault = "does not come down here" if name in tensors else "is missing"
        raise UpdateError(f"adapter from the server: {name} {fault}; check rule and method")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UpdateError(
                f"adapter from the server: {name} is {tuple(tensors[name].shape)}, expected "
                f"{shape}; check rank and base"
            )
    own = of_rank({name: tensors[name] for name in expected}, work.rank)
    return {name: t.detach().to(torch.float32, copy=True).contiguous() for name, t in own.items()}


def check_offset(work: SiteWork, offset: Mapping[str, Tensor]) -> None:
    """Whether a change of the frozen base may come at all; the network checks its shapes.

    Raises:
        UpdateError: if the rule sends none, or a value is not finite.
    """
    if offset and not work.parts.offset:
        raise UpdateError(
            f"rule {work.federation.rule!r} does not change the frozen base, but {min(offset)} "
            "came; check the rule"
        )
    for name, tensor in sorted(offset.items()):
        if not work.parts.down(name) or not bool(torch.isfinite(tensor).all()):
            raise UpdateError(f"offset from the server: {name} is none, or is not finite")
    _check_norm("offset", offset)


def server_control(work: SiteWork, control: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SCAFFOLD's control of the server by every shared name; empty with another optimiser.

    Raises:
        UpdateError: if it is not wanted, fits nothing, or a value is not finite.
    """
    if work.federation.optimizer != "scaffold":
        if control:
            raise UpdateError(f"optimizer is not scaffold, but a control of {min(control)} came")
        return {}
    shapes = work.spec().shapes
    for name, tensor in sorted(control.items()):
        if tuple(tensor.shape) != shapes.get(name) or not bool(torch.isfinite(tensor).all()):
            raise UpdateError(
                f"control of {name}: {tuple(tensor.shape)} is not {shapes.get(name)}, or holds nan "
                "or infinity"
            )
    _check_norm("control", control)
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return {**zeros, **{name: t.detach().float().cpu() for name, t in control.items()}}


def _check_norm(what: str, tensors: Mapping[str, Tensor]) -> None:
    """What no honest server sends: numbers that would overflow in the first step."""
    norm, most = total_norm(tensors.values()), DEFAULT_LIMITS.max_norm
    if not norm <= most:
        raise UpdateError(f"{what} from the server: norm {norm:.6g} is above {most:g}")
