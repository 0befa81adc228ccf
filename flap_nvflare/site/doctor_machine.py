"""The machine itself: device, memory, disk, rights, open files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from flap_nvflare.settings import OWN_NETWORK, Federation
from flap_nvflare.site.finding import Finding, size

# FLARE, torch and MONAI in the job's process, and FLARE's parent beside it.
_LIBRARIES = 1.5e9
# Volumes that training holds while it prepares them, at most; see `training.site_data`.
_HELD = 2e9
_MOMENTS = 3  # a tensor and its two moments
_ROUNDS_KEPT = 2
_OPEN_FILES = 1024


@dataclass(frozen=True)
class Needs:
    """What the site's scans will take, as far as it is known.

    Attributes:
        slices: slices of all cases.
        largest: voxels of the largest case.
        voxels: voxels of all cases.
        weights: bytes of the base weights in float32.
    """

    slices: int = 0
    largest: int = 0
    voxels: int = 0
    weights: float = 0.0

    def prepared(self, image_size: int) -> float:
        """Bytes of all prepared cases: an image of 4 bytes a pixel and a label of 1."""
        return 5.0 * self.slices * image_size**2

    def memory(self, image_size: int) -> float:
        """Bytes of main memory: libraries, two copies of the base, scans as they are prepared."""
        held = min(_HELD, 5.0 * self.voxels)
        # A scan is read as float32 and turned into another copy.
        return (
            _LIBRARIES + 2 * self.weights + self.prepared(image_size) + held + 10.0 * self.largest
        )


def check_device(wanted: str, processes: int = 1) -> Iterator[Finding]:
    """Whether the device of the site's file is there, and what it has free."""
    import torch

    from flap_nvflare.sam.runtime import free_memory

    if wanted == "mps" and not torch.backends.mps.is_available():
        mend = "write device: auto, or cpu"
        yield Finding("device", False, "mps: torch finds no Apple GPU", mend)
        return
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = wanted.startswith("cuda") or (wanted == "auto" and there > 0)
    if not cuda:
        found = f"{wanted}: {'mps' if wanted == 'mps' else 'CPU'}, {os.cpu_count()} cores"
        yield Finding("device", True, found)
        return
    number = int(wanted.partition(":")[2] or 0)
    needed = max(number + 1, processes)
    if there < needed:
        found = f"{wanted}: torch {torch.__version__} sees {there} GPUs, {needed} are needed"
        mend = (
            "check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES, and that torch is a CUDA build "
            "(pip install torch), or write device: cpu"
        )
        yield Finding("device", False, found, mend)
        return
    for index in range(processes) if processes > 1 else (number,):
        free = free_memory(torch.device("cuda", index))
        total = torch.cuda.get_device_properties(index).total_memory
        name = torch.cuda.get_device_name(index)
        found = f"cuda:{index} {name}: {size(free)} of {size(total)} free"
        yield Finding("device", True, found)


def check_memory(needs: Needs, federation: Federation) -> Iterator[Finding]:
    """Main memory that is free against an estimate of what training takes."""
    import torch

    from flap_nvflare.sam.runtime import free_memory

    free = free_memory(torch.device("cpu"))
    needed = needs.memory(federation.image_size)
    found = f"{size(free)} free, about {size(needed)} needed"
    found += f" for {needs.slices} slices at {federation.image_size} px"
    mend = "end other programs, or give the machine (or its container) more memory"
    yield Finding("memory", free >= needed, found, "" if free >= needed else mend)


def _trained_bytes(settings: Federation) -> int:
    """Bytes of what trains; 0 of another network than SAM, which only its own code knows."""
    from flap_nvflare.sam.tuning import count

    if settings.arch == OWN_NETWORK:
        return 0
    rows = count(settings.arch, settings.image_size, settings.classes, settings.rank)
    return {row.method: row.bytes for row in rows}[settings.method]


def check_disk(
    folder: Path, needs: Needs, federation: Federation, cache_gb: float
) -> Iterator[Finding]:
    """Free disk where the site keeps its state, against an estimate.

    Args:
        folder: the site's `state_dir`.
        needs: what the scans are.
        federation: image size, method and rank.
        cache_gb: the site's bound of prepared scans.
    """
    settings, trained = federation, _trained_bytes(federation)
    # The masks at native resolution are deflated to a few per cent.
    cache = min(cache_gb * 1e9, needs.prepared(settings.image_size) + 0.05 * needs.voxels)
    needed = cache + _MOMENTS * _ROUNDS_KEPT * trained
    free = shutil.disk_usage(existing(folder)).free
    found = f"{size(free)} free at {folder}, about {size(needed)} needed, {size(cache)} of it cache"
    mend = "make room, name another disk in state_dir, or lower cache_gb"
    yield Finding("disk", free >= needed, found, "" if free >= needed else mend)


def check_writing(name: str, folder: Path) -> Iterator[Finding]:
    """Whether a file can be written in `folder`, or the folder be made."""
    above = existing(folder)
    try:
        with TemporaryFile(dir=above) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        mend = f"give the user that runs FLARE the right to write in {above}, or make room there"
        yield Finding(name, False, f"{folder}: {error.strerror}", mend)
        return
    found = f"{folder}" if above == folder else f"{folder} can be made"
    yield Finding(name, True, found)


def check_open_files(least: int = _OPEN_FILES) -> Iterator[Finding]:
    """How many files a process may have open: sockets of FLARE, torch's shared tensors, scans."""
    try:
        import resource
    except ImportError:
        yield Finding("open files", None, "this system has no such limit")
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = limit == resource.RLIM_INFINITY or limit >= least
    shown = "no limit" if limit == resource.RLIM_INFINITY else str(limit)
    mend = "" if enough else f"ulimit -n {least} before start.sh, or nofile in limits.conf"
    yield Finding("open files", enough, f"{shown}, at least {least} asked for", mend)


def check_user(folder: Path) -> Iterator[Finding]:
    """Whether who asks is who runs FLARE: root may do what the owner of the kit may not."""
    owner, own = folder.stat().st_uid, os.geteuid()
    if owner == own:
        yield Finding("user", True, f"user {own}, the owner of {folder}")
    else:
        found = f"user {own}, but {folder} belongs to {owner}: as that user rights may differ"
        yield Finding("user", None, found)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder
