"""What the frozen blocks of the encoder make of a slice, computed once and kept.

Where adapters sit only in the encoder's last blocks, or the encoder does not train at all, the
tokens that reach the first trained block depend on the base model, the slice and its view alone.
They are made at the first visit and read from then on: in later epochs and rounds, in evaluation,
and by other processes that share the folder.

Kept in bfloat16: 2 x grid^2 x width bytes a slice (ViT-B: 0.3 MB at 224 pixels, 1.6 MB at 512).
Tokens that were just made are rounded in the same way, so results do not depend on what was kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flap_nvflare.data.store import Store, checksum
from flap_nvflare.sam.network import Network
from flap_nvflare.sam.runtime import Runtime

# Of the code that makes the tokens: raise it with every change of their bytes.
VERSION = 1
_NAME = "tokens"


class PrefixCache:
    """Batches of slices with tokens in place of images.

    Args:
        network: the network; which blocks are frozen is its own matter.
        runtime: how it runs.
        store: the site's bounded folder. Without one the tokens stay in memory.
        memory_bytes: bound of what stays in memory.

    Attributes:
        made: slices whose tokens were computed here.
        found: slices whose tokens were kept from before.
    """

    def __init__(
        self, network: Network, runtime: Runtime, store: Store, memory_bytes: int = 2 * 10**9
    ) -> None:
        self._network = network
        self._runtime = runtime
        self._store = store
        self._room = memory_bytes
        self._held: dict[str, Tensor] = {}
        self.made = 0
        self.found = 0

    def batches(self, loader: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        """The batches of `loader`, those with keys with tokens for images.

        A slice that is changed at random anew at every draw has no key, and its batch stays as it
        is; so does every batch where nothing of the encoder is frozen.
        """
        return _Batches(self, loader) if self._network.frozen_blocks else loader

    def tokens(self, images: Tensor, keys: list[str]) -> Tensor:
        """Tokens (n, grid, grid, width) float32 of images (n, 3, S, S) with their keys."""
        made_by, kept = self._maker(), []
        for image, key in zip(images, keys, strict=True):
            name = hashlib.sha256(f"{made_by}\n{key}".encode()).hexdigest()
            tokens = self._read(name)
            if tokens is None:
                tokens = self._make(image)
                self._write(name, tokens)
                self.made += 1
            else:
                self.found += 1
            kept.append(tokens)
        return torch.stack(kept).float()

    def _make(self, image: Tensor) -> Tensor:
        # One by one: a product may round otherwise in a batch, and which slices are missing
        # depends on what was kept.
        with torch.inference_mode(False), torch.no_grad(), self._runtime.autocast():
            tokens = self._network.prefix(image[None].to(self._runtime.device))
        return tokens[0].to("cpu", torch.bfloat16)

    def _maker(self) -> str:
        """All that decides the tokens besides the slice."""
        network, runtime = self._network, self._runtime
        parts = (
            str(VERSION),
            torch.__version__,
            network.base_sha256,
            str(network.frozen_blocks),
            str(dataclasses.replace(runtime, checkpointing=False)),
            str(torch.get_num_threads()),
        )
        return "\n".join(parts)

    def _read(self, name: str) -> Tensor | None:
        if name in self._held:
            return self._held[name]
        data = self._store.read(f"{name}.{_NAME}")
        if data is None:
            return None
        try:
            found = load(data)
            tokens = found[_NAME]
            if int(found["crc32"]) == checksum([tokens]):
                return tokens
        except (SafetensorError, KeyError):
            pass
        self._store.drop(f"{name}.{_NAME}")
        return None

    def _write(self, name: str, tokens: Tensor) -> None:
        data = save({_NAME: tokens.contiguous(), "crc32": torch.tensor(checksum([tokens]))})
        if self._store.write(f"{name}.{_NAME}", data):
            return
        if (size := tokens.numel() * tokens.element_size()) <= self._room:
            self._held[name] = tokens
            self._room -= size


class _Batches:
    """An iterable of batches as MONAI's engines take it."""

    def __init__(self, cache: PrefixCache, loader: Iterable[dict[str, Any]]) -> None:
        self._cache = cache
        self._loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            if all(batch["key"]):
                batch = {**batch, "image": self._cache.tokens(batch["image"], batch["key"])}
            yield batch
