"""What a site remembers from round to round, as files of its own.

Each file is named by the round it was written after. The file of the moments is written last and
makes its round count: a round that a kill broke off leaves nothing that is read again. The last
two rounds are kept, so that a round can be done again from the state of the one before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from flap_nvflare.training.errors import StateError
from flap_nvflare.training.tensor_files import read_tensors, write_tensors

MOMENTS = "moments"
PRIVATE = "private"
PERSONAL = "personal"
PERSONAL_MOMENTS = "personal_moments"
CONTROL = "control"
_KINDS = (MOMENTS, PRIVATE, PERSONAL, PERSONAL_MOMENTS, CONTROL)
_NAME = re.compile(rf"({'|'.join(_KINDS)})_(\d+)\.safetensors")
_FORMAT = "flap_nvflare.site.1"
_KEPT = 2


class SiteMemory:
    """The folder of a site's memory of one run.

    Args:
        folder: on the site's own disk; made when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, round_index: int) -> Path:
        """The file of one kind after that round."""
        return self.folder / f"{kind}_{round_index}.safetensors"

    def last(self, before: int) -> int | None:
        """The last round before round `before` that this site finished; None if there is none."""
        rounds = [index for index in self._rounds() if index < before]
        return max(rounds, default=None)

    def files(self) -> list[Path]:
        """All files of the memory, sorted."""
        return sorted(path for path, _, _ in self._found())

    def begin(self, round_index: int) -> None:
        """The round's files will be written: until its moments are, it does not count."""
        self.path(MOMENTS, round_index).unlink(missing_ok=True)

    def finish(self, round_index: int) -> None:
        """The round's files are written: forgets those of rounds after it and of long before."""
        kept = sorted(index for index in self._rounds() if index <= round_index)[-_KEPT:]
        for path, _, index in self._found():
            if index not in kept:
                path.unlink(missing_ok=True)

    def write(self, kind: str, round_index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes tensors of one kind."""
        write_tensors(self.path(kind, round_index), tensors, f"{_FORMAT}.{kind}")

    def read(
        self, kind: str, round_index: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor] | None:
        """The tensors of one kind; None if there is no such file.

        Raises:
            StateError: if the file is damaged, or names and shapes are not exactly `shapes`.
        """
        path = self.path(kind, round_index)
        if not path.exists():
            return None
        tensors, _ = read_tensors(path, f"{_FORMAT}.{kind}")
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(found.keys() | shapes.keys()):
            if found.get(name) != shapes.get(name):
                raise StateError(
                    f"{path}: {name} is {found.get(name)}, expected {shapes.get(name)}; it was "
                    "written under other settings, delete the file"
                )
        return tensors

    def _rounds(self) -> set[int]:
        return {index for _, kind, index in self._found() if kind == MOMENTS}

    def _found(self) -> list[tuple[Path, str, int]]:
        found = []
        for path in self.folder.glob("*.safetensors"):
            if match := _NAME.fullmatch(path.name):
                found.append((path, match[1], int(match[2])))
        return found
