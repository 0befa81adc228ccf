"""The durable folder of one run at the server: what the report reads and a resume needs.

Written so that a kill at any moment leaves the last finished round whole: the adapter's file
is replaced atomically and holds its round, and everything else is cut back to that round when
a run goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from flap_nvflare.adapter.factors import LORA_A, LORA_B
from flap_nvflare.adapter.parcel import OFFSET_A, OFFSET_B
from flap_nvflare.adapter.update import UpdateError, UpdateSpec, load_update, save_update
from flap_nvflare.training.errors import StateError
from flap_nvflare.training.tensor_files import read_tensors, write_tensors

LAST, BEST = "adapter_last", "adapter_best"
Tensors = dict[str, torch.Tensor]
# Parts of an adapter that some rules leave as they are: drawn factors, and a change of the base.
FROZEN_SUFFIXES = (LORA_A, LORA_B, OFFSET_A, OFFSET_B)
# A plain name, of a site below its folder.
_ADAPTER = re.compile(r"(sites/)?\w[\w .@+()-]{0,199}")
_STATE_FORMAT = "flap_nvflare.server.1"
# What a job itself writes. All else, such as an evaluation, its pictures and a page that shows
# them, names cases or shows their slices, and is the server operator's own.
_RESULTS = (
    f"{LAST}.safetensors",
    f"{BEST}.safetensors",
    "sites",
    "rounds.jsonl",
    "cross_site.json",
    "run.json",
    "tensorboard",
    "mlflow.db",
    "mlflow.json",
)


class Saved(NamedTuple):
    """An adapter's file.

    Attributes:
        tensors: what trains and travels.
        frozen: what belongs to the adapter and does not train: factors that stay as drawn, and
            the change of the base that a rule has made.
        extra: further values.
    """

    tensors: Tensors
    frozen: Tensors
    extra: dict[str, Any]


class RunFolder:
    """Reads and writes the artifacts of one run in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FileLock | None = None

    def hold(self, seconds: float = 60.0) -> None:
        """Keeps every other process from writing here until this one ends, however it ends.

        Raises:
            TimeoutError: if another has it, for so many seconds.
        """
        self._lock = FileLock(self.path / ".lock", is_singleton=True, thread_local=False)
        try:
            self._lock.acquire(timeout=seconds)
        except Timeout as error:
            raise TimeoutError(
                f"{self.path}: another process writes into this run; wait for its job to end, or "
                "abort it"
            ) from error

    def release(self) -> None:
        """Gives up what `hold` took."""
        if self._lock is not None:
            self._lock.release(force=True)

    def publish(self, folder: Path) -> None:
        """Copies what the job wrote to `folder`, from where the administrator downloads it."""
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path)
            if path.is_file() and name.parts[0] in _RESULTS and not path.name.startswith("."):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)

    def adapter_path(self, name: str) -> Path:
        """File of the adapter `name`: `adapter_last`, `adapter_best` or `sites/<site>`."""
        if not _ADAPTER.fullmatch(name):
            raise ValueError(f"adapter {name[:200]!r} would lie outside {self.path}")
        return self.path / f"{name}.safetensors"

    def save(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        spec: UpdateSpec,
        frozen: Mapping[str, torch.Tensor] | None = None,
        **extra: Any,
    ) -> None:
        """Writes an adapter atomically; `extra` values are kept as JSON in its metadata."""
        path = self.adapter_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {**tensors, **(frozen or {})}
        shapes = {key: tuple(tensor.shape) for key, tensor in whole.items()}
        save_update(
            path,
            whole,
            dataclasses.replace(spec, shapes=shapes),
            {key: json.dumps(value) for key, value in extra.items()},
        )

    def load(self, name: str, spec: UpdateSpec) -> Saved | None:
        """The adapter's file; None if there is none yet.

        Raises:
            UpdateError: if the file was made with another method, rank, shape or base.
        """
        path = self.adapter_path(name)
        if not path.is_file():
            return None
        tensors, found, extra = load_update(path)
        frozen = {key: tensors.pop(key) for key in sorted(tensors) if _is_frozen(key, spec)}
        shapes = {key: found.shapes[key] for key in tensors}
        found = dataclasses.replace(found, shapes=shapes)
        if found != spec:
            raise UpdateError(
                f"{path}: made with other settings ({found.method}, rank {found.rank}, base "
                f"{found.base_sha256[:12]}) than this job's ({spec.method}, rank {spec.rank}, base "
                f"{spec.base_sha256[:12]}){_first_difference(found, spec)}; restore the settings "
                f"or start a new run"
            )
        return Saved(tensors, frozen, {key: json.loads(value) for key, value in extra.items()})

    def save_state(self, rounds: int, tensors: Mapping[str, torch.Tensor], **extra: Any) -> None:
        """Writes what the server remembers after `rounds` rounds besides the adapter."""
        said = json.dumps(extra, sort_keys=True)
        write_tensors(self._state_path(rounds), tensors, _STATE_FORMAT, said)

    def load_state(self, rounds: int) -> tuple[Tensors, dict[str, Any]]:
        """What `save_state` wrote.

        Raises:
            UpdateError: if it is not there or damaged.
        """
        try:
            tensors, said = read_tensors(self._state_path(rounds), _STATE_FORMAT)
        except StateError as error:
            raise UpdateError(f"{error}, and start a new run") from error
        return tensors, dict(json.loads(said))

    def drop_states(self, rounds: int) -> None:
        """Removes the states of all rounds but `rounds`."""
        for path in self.path.glob("server_*.safetensors"):
            if path != self._state_path(rounds):
                path.unlink(missing_ok=True)

    def _state_path(self, rounds: int) -> Path:
        return self.path / f"server_{rounds}.safetensors"

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


def _is_frozen(name: str, spec: UpdateSpec) -> bool:
    return name not in spec.shapes and name.endswith(FROZEN_SUFFIXES)


def _first_difference(found: UpdateSpec, spec: UpdateSpec) -> str:
    """The first tensor that only one has or that differs in shape, as with other lora_blocks."""
    for name in sorted({*found.shapes, *spec.shapes}):
        if found.shapes.get(name) != spec.shapes.get(name):
            return (
                f"; {name} is {found.shapes.get(name, 'missing')} in the file, "
                f"{spec.shapes.get(name, 'missing')} in this job"
            )
    return ""
