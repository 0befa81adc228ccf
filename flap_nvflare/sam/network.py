"""What the training workflow asks of a network besides its forward pass.

`Segmenter` is SAM and has all of it. `bundle.own_network.OwnNetwork` is any other network and has
what is here: nothing kept of frozen blocks, no change of the base, no switches of SAM's encoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Network(nn.Module):
    """Images in, logits for every class out.

    Attributes:
        image_size: side S of the square input in pixels.
        classes: foreground classes, C.
        base_sha256: identity of the weights that training starts from.
        channels_last: whether images are put into the channels-last layout.
    """

    def __init__(self, image_size: int, classes: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.classes = classes
        self.base_sha256 = ""
        self.channels_last = False

    @property
    def frozen_blocks(self) -> int:
        """Blocks at the start in which nothing trains, whose result `prefix` may keep."""
        return 0

    def prefix(self, image: Tensor) -> Tensor:
        """What the frozen blocks make of images; `forward` takes it as well."""
        raise NotImplementedError("this network keeps nothing of its frozen blocks")

    @property
    def offset(self) -> dict[str, Tensor]:
        """The change of the frozen base that holds now."""
        return {}

    def set_offset(self, offset: Mapping[str, Tensor]) -> None:
        """Changes the frozen base, in place of any change before.

        Raises:
            ValueError: if it does not fit.
        """
        if offset:
            raise ValueError(f"{min(offset)}: the base of this network is never changed")
