"""The durable folder of one run at the server: what the report reads and a resume needs.

Written so that a kill at any moment leaves the last finished round whole: the adapter's file
is replaced atomically and holds its round, and everything else is cut back to that round when
a run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flap_nvflare.adapter.update import UpdateError, UpdateSpec, load_update, save_update

LAST, BEST = "adapter_last", "adapter_best"
Tensors = dict[str, torch.Tensor]


class RunFolder:
    """Reads and writes the artifacts of one run in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def adapter_path(self, name: str) -> Path:
        """File of the adapter `name`: `adapter_last`, `adapter_best` or `sites/<site>`."""
        if ".." in Path(name).parts:
            raise ValueError(f"adapter {name!r} would lie outside {self.path}")
        return self.path / f"{name}.safetensors"

    def save(
        self, name: str, tensors: Mapping[str, torch.Tensor], spec: UpdateSpec, **extra: Any
    ) -> None:
        """Writes an adapter atomically; `extra` values are kept as JSON in its metadata."""
        path = self.adapter_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_update(path, dict(tensors), spec, {key: json.dumps(v) for key, v in extra.items()})

    def load(self, name: str, spec: UpdateSpec) -> tuple[Tensors, dict[str, Any]] | None:
        """The adapter and its extra values; None if there is none yet.

        Raises:
            UpdateError: if the file was made with another method, rank, shape or base.
        """
        path = self.adapter_path(name)
        if not path.is_file():
            return None
        tensors, found, extra = load_update(path)
        if found != spec:
            raise UpdateError(
                f"{path}: made with other settings ({found.method}, rank {found.rank}, base "
                f"{found.base_sha256[:12]}) than this job's ({spec.method}, rank {spec.rank}, base "
                f"{spec.base_sha256[:12]}){_first_difference(found, spec)}; restore the settings "
                f"or start a new run"
            )
        return tensors, {key: json.loads(value) for key, value in extra.items()}

    def write_json(self, name: str, value: Any) -> None:
        """Writes `name` atomically as indented JSON."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(self.path / name)

    def append_round(self, line: Mapping[str, Any]) -> None:
        """Adds one line to `rounds.jsonl`."""
        with self._rounds_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rounds(self) -> list[dict[str, Any]]:
        """The finished rounds; a line cut off by a kill is left out."""
        lines: list[dict[str, Any]] = []
        if self._rounds_path.is_file():
            for text in self._rounds_path.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    break
        return lines

    def cut_rounds(self, finished: int) -> None:
        """Keeps the lines of the first `finished` rounds only."""
        kept = [line for line in self.rounds() if line["round"] < finished]
        temporary = self._rounds_path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self._rounds_path)

    @property
    def _rounds_path(self) -> Path:
        return self.path / "rounds.jsonl"


def _first_difference(found: UpdateSpec, spec: UpdateSpec) -> str:
    """The first tensor that only one has or that differs in shape, as with other lora_blocks."""
    for name in sorted({*found.shapes, *spec.shapes}):
        if found.shapes.get(name) != spec.shapes.get(name):
            return (
                f"; {name} is {found.shapes.get(name, 'missing')} in the file, "
                f"{spec.shapes.get(name, 'missing')} in this job"
            )
    return ""
