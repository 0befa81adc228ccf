"""Federated low-rank fine-tuning of the Segment Anything Model on NVIDIA FLARE and MONAI.

This module stays empty of imports: FLARE starts a process for every site and task, and
each room is imported only where it is used.
"""

from __future__ import annotations

__version__ = "0.1.0"
