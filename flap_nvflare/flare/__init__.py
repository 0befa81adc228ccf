"""What FLARE loads: thin shells that read a message, call a room and write a message.

Importing this package registers FLARE's decomposer for torch tensors; without it a message
with tensors is tried again for ever instead of failing.
"""

from __future__ import annotations

from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

fobs.register(TensorDecomposer)
