"""`svd`: the exact weighted mean of the products, cut to rank r.

Papers: FLAP-SAM, arXiv 2407.21739; FlexLoRA, arXiv 2402.11505.
Formula: M = sum_k w_k B_k A_k = U S V^T; the best approximation of rank r keeps the r largest
singular values (Eckart and Young). Every other tensor: weighted mean.
Bytes: one adapter up and one down, a site and round.
Exact: up to the cut, whose relative error is reported; exact if M has rank r or less.

M is never formed. With the sites' factors stacked, M = L R for L (out, k r) and R (k r, in);
QR of L and of R^T leaves a matrix of at most k r x k r for the SVD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flap_nvflare.aggregation.rule import (
    Aggregate,
    Contribution,
    Stack,
    plain_names,
    prepared,
    stacks,
    weighted_mean,
)

GAUGES = ("balanced", "paper")
_ROUNDING = 1e-12


def svd(contributions: Sequence[Contribution], gauge: str = "balanced") -> Aggregate:
    """Best cut to rank r of the exact mean product.

    Args:
        contributions: the sites' updates.
        gauge: how S is shared between the factors. `paper`: B = U, A = S V^T. `balanced`:
            B = U sqrt(S), A = sqrt(S) V^T. The product is the same. An adaptive optimiser
            steps every entry by about its rate, so with `paper` a step in A moves the product
            by |U| and a step in B by |S V^T|, often hundreds of times less; `balanced` keeps
            the two alike.

    Raises:
        ValueError: on an unknown gauge or on updates that do not fit together.
    """
    if gauge not in GAUGES:
        raise ValueError(f"gauge {gauge!r} is not known; expected one of {GAUGES}")
    ordered = prepared(contributions)
    dtype = next(iter(ordered[0].tensors.values())).dtype
    tensors = {name: weighted_mean(ordered, name) for name in plain_names(ordered)}
    cut = exact = 0.0
    for stack in stacks(ordered):
        b, values, a = _decompose(stack)
        exact += float(values.square().sum())
        cut += float(values[:, stack.rank :].square().sum())
        kept = _pad(values, stack.rank)
        b, a = _share(b, kept, a, stack, gauge)
        for index, pair in enumerate(stack.pairs):
            tensors[pair.b] = b[index].to(dtype)
            tensors[pair.a] = a[index].to(dtype)
    error = (cut / exact) ** 0.5 if exact > 0 else 0.0
    return Aggregate({name: tensors[name] for name in sorted(tensors)}, error, turned=True)


def _decompose(stack: Stack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (n, out, r), all singular values (n, m), V^T (n, r, in), signs fixed."""
    q_left, r_left = torch.linalg.qr(stack.left)
    q_right, r_right = torch.linalg.qr(stack.right.mT)
    u, values, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    b = _pad_columns(q_left @ u[:, :, : stack.rank], stack.rank)
    a = _pad_columns((vh[:, : stack.rank] @ q_right.mT).mT, stack.rank).mT
    # A singular vector's sign is free: the largest entry of each column of U is positive.
    largest = b.gather(1, b.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(b.dtype)
    return b * signs, values, a * signs.mT


def _share(
    b: torch.Tensor, values: torch.Tensor, a: torch.Tensor, stack: Stack, gauge: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors with the singular values in them, and no dead direction.

    Where M has rank below r, a direction with both factors zero would never train again, as
    its gradients vanish: there B stays zero and A keeps a row of the sites' mean A, as at the
    start of a federation.
    """
    largest = values.amax(dim=1, keepdim=True)
    alive = values > largest * _ROUNDING
    values = torch.where(alive, values, 0.0)
    if gauge == "paper":
        b_scale, a_scale = alive.to(b.dtype), values
    else:
        b_scale = a_scale = values.sqrt()
    parts = stack.right.shape[1] // stack.rank
    mean_a = stack.right.unflatten(1, (parts, stack.rank)).mean(dim=1)
    a = torch.where(alive[:, :, None], a * a_scale[:, :, None], mean_a)
    return b * b_scale[:, None, :], a


def _pad(values: torch.Tensor, rank: int) -> torch.Tensor:
    """The r largest singular values, with zeros where there are fewer."""
    kept = values[:, :rank]
    return torch.nn.functional.pad(kept, (0, rank - kept.shape[1]))


def _pad_columns(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, rank - matrix.shape[2]))
