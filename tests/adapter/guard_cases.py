"""A right update for the guard's tests, and what a peer may send in place of its parts."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

from flap_nvflare.adapter.update import UpdateSpec

SHAPES = {"q.lora_a": (2, 3), "q.lora_b": (4, 2), "head.weight": (5,), "head.scale": ()}
SPEC = UpdateSpec("flap", 2, "ab" * 32, SHAPES)
FROZEN = frozenset({"image_encoder.pos_embed", "mask_decoder.iou_token"})


def good(seed: int = 0) -> dict[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def odd_tensors() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torch.ones(2, 3)
        return {
            "ndarray, no tensor": np.ones((2, 3), np.float32),
            "list, no tensor": [[1.0] * 3] * 2,
            "NoneType, no tensor": None,
            "UninitializedParameter, no tensor": torch.nn.UninitializedParameter(),
            "torch.sparse_coo": plain.to_sparse(),
            "torch.sparse_csr": plain.to_sparse_csr(),
            "meta": plain.to("meta"),
            "torch.qint8": torch.quantize_per_tensor(plain, 1.0, 0, torch.qint8),
            "no plain dense tensor": torch.nested.nested_tensor([plain[0], plain[1]]),
            "dtype torch.complex64": plain.to(torch.complex64),
            "dtype torch.float64": plain.double(),
            "dtype torch.float16": plain.half(),
            "dtype torch.int32": plain.int(),
            "dtype torch.bool": plain.bool(),
            "shape (3, 2), expected (2, 3)": plain.T,
            "shape (1, 2, 3)": plain[None],
            "shape (0, 3)": plain[:0],
            "1 of 6 values": torch.tensor([[1, 2, 3], [4, 5, math.nan]]),
            "2 of 6 values": torch.tensor([[1, 2, 3], [4, -math.inf, math.inf]]),
            "6 of 6 values": torch.tensor(math.nan).expand(2, 3),
        }


class Hostile:
    """Raises wherever it is touched."""

    def _raise(self, *_: Any) -> Any:
        raise RuntimeError("touched")

    __len__ = __iter__ = __getitem__ = __getattr__ = __repr__ = __str__ = __bool__ = _raise
    __eq__ = __lt__ = __float__ = __int__ = __index__ = __format__ = _raise  # type: ignore[assignment]
    __hash__ = object.__hash__
