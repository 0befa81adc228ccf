"""What a site holds of the federation between two messages, in files of its own, by round."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.tensor_files import read_tensors, write_tensors

_FORMAT = "flap_nvflare.held.1"
_HELD, _RESIDUE = "held", "residue"
_NAME = re.compile(rf"({_HELD}|{_RESIDUE})_(\d+)\.safetensors")
_KEPT = 2


class HeldAdapter:
    """The adapters that a site has received, and what its own messages have lost.

    The last two rounds are kept, so that a round can be done again.

    Args:
        folder: the site's folder for this run.
        federation: the settings, from whose seed the first adapter is drawn.
        site: the site's disk, for the base.
    """

    def __init__(self, folder: Path, federation: Federation, site: Site) -> None:
        self._folder, self._federation, self._site = folder, federation, site

    def of(self, round_index: int) -> dict[str, Tensor]:
        """The adapter that the site received in the round.

        Raises:
            StateError: if it is not there.
        """
        return read_tensors(self._path(_HELD, round_index), _FORMAT)[0]

    def before(self, round_index: int) -> dict[str, Tensor]:
        """What the site held before the round's message: at first what it draws from the seed."""
        last = self._last(_HELD, round_index)
        if last is not None:
            return self.of(last)
        from flap_nvflare.bundle.builders import first_adapter

        return first_adapter(self._federation, self._site)

    def keep(self, round_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the adapter received in the round."""
        self._write(_HELD, round_index, tensors)

    def residue(self, round_index: int) -> dict[str, Tensor]:
        """What the messages before the round have lost; empty if nothing is known."""
        last = self._last(_RESIDUE, round_index)
        return {} if last is None else read_tensors(self._path(_RESIDUE, last), _FORMAT)[0]

    def keep_residue(self, round_index: int, residue: Mapping[str, Tensor]) -> None:
        """Writes what the messages have lost up to and with the round's."""
        if residue:
            self._write(_RESIDUE, round_index, residue)

    def _write(self, kind: str, round_index: int, tensors: Mapping[str, Tensor]) -> None:
        write_tensors(self._path(kind, round_index), tensors, _FORMAT)
        rounds = self._rounds(kind)
        for index in rounds:
            if index > round_index or index not in [r for r in rounds if r <= round_index][-_KEPT:]:
                self._path(kind, index).unlink(missing_ok=True)

    def _last(self, kind: str, before: int) -> int | None:
        return max((index for index in self._rounds(kind) if index < before), default=None)

    def _rounds(self, kind: str) -> list[int]:
        found = (_NAME.fullmatch(path.name) for path in self._folder.glob("*.safetensors"))
        return sorted(int(match[2]) for match in found if match and match[1] == kind)

    def _path(self, kind: str, round_index: int) -> Path:
        return self._folder / f"{kind}_{round_index}.safetensors"
