"""Cases made ready for the network once: read, checked, turned, windowed, resized.

All of this is the same for every round, so it is a chain of MONAI transforms whose result a
`PersistentDataset` keeps on the site's disk. A process that starts later reads the result instead
of the scan. The scan's own values are not kept. A case takes S x (5 S'^2) bytes and its deflated
mask, 50 MB for 200 slices at 224 pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data.dataset import PersistentDataset
from monai.transforms.compose import Compose
from monai.transforms.transform import Transform
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import interpolate

from flap_nvflare.data.cases import Case
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.store import Store, checksum
from flap_nvflare.data.volume import Volume, load_volume
from flap_nvflare.data.window import (
    AIR,
    LOOKED_AT,
    PERCENTILES,
    ROBUST_RANGE,
    Window,
    volume_window,
)

logger = logging.getLogger(__name__)

# Of all that decides the bytes of a prepared case: raise it with every change of them.
VERSION = 1
_TENSORS = ("images", "labels", "mask", "shape", "spacing")


@dataclass(frozen=True, eq=False)
class Prepared:
    """One case as the network sees it, and what it is scored against.

    Attributes:
        name: name of the case.
        key: hash of all that the bytes depend on; the same in every process.
        images: (S, S', S') float32, through the window.
        labels: (S, S', S') uint8.
        mask: (bytes,) uint8, the deflated mask at native resolution.
        shape: (S, H, W) of the native mask.
        spacing: mm between native voxels along (S, H, W).
    """

    name: str
    key: str
    images: Tensor
    labels: Tensor
    mask: Tensor
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    @classmethod
    def of(cls, name: str, key: str, tensors: Mapping[str, Tensor]) -> Prepared:
        """A case out of what `PrepareSlices` gives."""
        slices, height, width = tensors["shape"].tolist()
        along, down, across = tensors["spacing"].tolist()
        return cls(
            name=name,
            key=key,
            images=tensors["images"],
            labels=tensors["labels"],
            mask=tensors["mask"],
            shape=(slices, height, width),
            spacing=(along, down, across),
        )

    def native_label(self) -> Tensor:
        """The mask at native resolution, (S, H, W) uint8."""
        flat = np.frombuffer(
            bytearray(zlib.decompress(self.mask.numpy().tobytes())), dtype=np.uint8
        )
        return torch.from_numpy(flat).reshape(self.shape)


class ReadCase(Transform):
    """Reads scan and mask of `case`, or takes the volume if it is at hand; see `load_volume`.

    Args:
        held: volumes by the name of their case; each is given away once.
    """

    def __init__(self, held: dict[str, Volume]) -> None:
        self._held = held

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Puts `volume` beside what is in `data`."""
        case = data["case"]
        volume = self._held.pop(case.name, None) or load_volume(case, data["classes"])
        return {**data, "volume": volume}


class PrepareSlices(Transform):
    """Windows and resizes the slices of `volume` and deflates its mask.

    Without a window, the volume's own is taken.

    Images are bilinear, low-pass filtered when shrunk; labels take the nearest voxel.
    """

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a `Prepared` in place of `data`."""
        volume: Volume = data["volume"]
        size = (data["image_size"], data["image_size"])
        window = volume_window(volume) if data["window"] is None else data["window"]
        images = prepare_images(volume.image, window, data["image_size"])
        label = torch.from_numpy(volume.label)[:, None]
        labels = interpolate(label, size=size, mode="nearest-exact")
        deflated = zlib.compress(volume.label.tobytes(), 1)
        return {
            "images": images,
            "labels": labels[:, 0].contiguous(),
            "mask": torch.frombuffer(bytearray(deflated), dtype=torch.uint8),
            "shape": torch.tensor(volume.label.shape),
            "spacing": torch.tensor(volume.spacing, dtype=torch.float64),
        }


def prepare_images(image: np.ndarray, window: Window, image_size: int) -> Tensor:
    """Slices as the network sees them; of some slices of a volume the same as of all.

    Args:
        image: (n, H, W) float32, in the units of the scan.
        window: grey values of the site, or of the scan.
        image_size: S', side of the network's input.

    Returns:
        (n, S', S') float32, bilinear, low-pass filtered when shrunk.
    """
    planes = torch.from_numpy(window.apply(image))[:, None]
    size = (image_size, image_size)
    small = interpolate(planes, size=size, mode="bilinear", align_corners=False, antialias=True)
    return small[:, 0].contiguous()


class PreparedCases(PersistentDataset):
    """Cases through the chain, each from disk where it was prepared before.

    MONAI's own files are written through the system's temporary folder, which is not whole
    on another file system, and a truncated one ends the run; here a `Store` of safetensors
    takes their place. A damaged file is removed and made again from the scan.

    Args:
        cases: the cases.
        window: the site's grey values; None for those of each scan by itself.
        image_size: S', side of the network's input; H and W are both resized to it.
        classes: number of foreground classes C.
        store: where prepared cases are kept.
        held: volumes that were read already, by the name of their case.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        window: Window | None,
        image_size: int,
        classes: int,
        store: Store,
        held: dict[str, Volume] | None = None,
    ) -> None:
        items = [
            {
                "case": case,
                "window": window,
                "image_size": image_size,
                "classes": classes,
                "key": case_key(case, window, image_size, classes),
            }
            for case in cases
        ]
        chain = Compose([ReadCase({} if held is None else held), PrepareSlices()])
        super().__init__(items, chain, cache_dir=None)
        self._store = store

    def _cachecheck(self, item_transformed: dict[str, Any]) -> dict[str, Tensor]:
        name = f"{item_transformed['key']}.safetensors"
        stored = self._store.read(name)
        if stored is not None:
            try:
                return _unpack(stored)
            except (SafetensorError, ValueError) as error:
                logger.warning("a cached case is damaged (%s) and is prepared again", error)
                self._store.drop(name)
        tensors = self._prepare(item_transformed)
        self._store.write(name, _pack(tensors))
        return tensors

    def _prepare(self, item: dict[str, Any]) -> dict[str, Tensor]:
        try:
            tensors: dict[str, Tensor] = self._pre_transform(item)
        except RuntimeError as error:  # MONAI's wrapping of what a transform raises
            if isinstance(error.__cause__, DataError):
                raise error.__cause__ from None
            raise
        return tensors

    def _transform(self, index: int) -> Prepared:
        item = self.data[index]
        return Prepared.of(item["case"].name, item["key"], super()._transform(index))


def case_key(case: Case, window: Window | None, image_size: int, classes: int) -> str:
    """Hash of all that decides a prepared case: files, settings, and the code that makes it."""
    values: tuple[object, ...] = ("scan", PERCENTILES, ROBUST_RANGE, AIR, LOOKED_AT)
    if window is not None:
        values = (window.low, window.high, window.mean, window.std)
    return _hash("case", _stamp(case), values, image_size, classes)


def window_key(cases: Sequence[Case], classes: int) -> str:
    """Hash of all that decides a site's window: the files of its training cases."""
    return _hash("window", sorted(json.dumps(_stamp(case)) for case in cases), classes, PERCENTILES)


def read_window(store: Store, key: str) -> Window | None:
    """The window kept under `key`; None if there is none or it is damaged."""
    stored = store.read(f"{key}.json")
    if stored is None:
        return None
    try:
        low, high, mean, std = (float(value) for value in json.loads(stored))
        return Window(low, high, mean, std)
    except (ValueError, TypeError):
        store.drop(f"{key}.json")
        return None


def write_window(store: Store, key: str, window: Window) -> None:
    """Keeps a window, to the last digit."""
    values = (window.low, window.high, window.mean, window.std)
    store.write(f"{key}.json", json.dumps(values).encode())


def _hash(*parts: object) -> str:
    text = json.dumps([VERSION, torch.__version__, np.__version__, *parts])
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(case: Case) -> list[object]:
    """Place, size and time of both files, and how labels are taken; a file that is missing is
    left to its reader."""
    stamps: list[object] = []
    for path in (case.image, case.label):
        try:
            status = path.stat()
        except OSError:
            stamps.append((str(path.absolute()), -1, -1))
        else:
            stamps.append((str(path.absolute()), status.st_size, status.st_mtime_ns))
    return [*stamps, case.binary]


def _pack(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file with a checksum: its own header only knows how long it should be."""
    return save({**tensors, "crc32": torch.tensor(checksum([tensors[name] for name in _TENSORS]))})


def _unpack(data: bytes) -> dict[str, Tensor]:
    tensors = load(data)
    found = tensors.pop("crc32", None)
    if sorted(tensors) != sorted(_TENSORS) or found is None:
        raise ValueError(f"it holds {sorted(tensors)}")
    if int(found) != checksum([tensors[name] for name in _TENSORS]):
        raise ValueError("its checksum differs")
    return tensors
