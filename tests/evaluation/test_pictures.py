"""What is kept of a case until its site is drawn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from flap_nvflare.evaluation.pictures import Pictures
from flap_nvflare.training.scores import CaseScore


def test_of_a_case_one_slice_is_kept_and_not_the_whole_mask() -> None:
    mask = torch.zeros((6, 4, 5), dtype=torch.uint8)
    mask[2, 1:3] = 1
    volume = SimpleNamespace(name="case_00000", native_label=lambda: torch.zeros_like(mask))
    pictures = Pictures(Path(), 1, ("kidney",))
    pictures.look(volume, mask, CaseScore("case_00000", (0.5,), (0.5,)))  # type: ignore[arg-type]
    ((_, _, index, kept),) = pictures._seen
    assert index == 2
    assert np.array_equal(kept, mask[2].numpy())
    assert not np.shares_memory(kept, mask.numpy())
