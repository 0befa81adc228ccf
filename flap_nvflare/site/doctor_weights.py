"""The base weights: there, whole, of the official format, and the very file that is pinned.

Of another network than SAM only that its config is there: to build it would run the site's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flap_nvflare.site.finding import Finding, size


def check_weights(checkpoint: str, pinned: str, wanted: str = "") -> Iterator[Finding]:
    """Loads the file as training does; nothing in it is run.

    Args:
        checkpoint: file of SAM's weights; empty for the packaged ViT-T.
        pinned: the only SHA-256 that the site accepts; empty accepts any.
        wanted: architecture that the federation asks for; empty where it isn't known yet.
    """
    # Torch and segment_anything, only where they are needed.
    from flap_nvflare.sam.checkpoint import PACKAGED, file_sha256, recognise_checkpoint

    path = Path(checkpoint) if checkpoint else PACKAGED
    arch = recognise_checkpoint(path)
    what = "" if checkpoint else ", the packaged one: no checkpoint is named"
    found = f"{path}: {arch}, {size(path.stat().st_size)}{what}"
    fits = wanted in ("", arch)
    mend = "" if fits else f"name the published file of {wanted} as checkpoint in flap_site.yaml"
    if not fits:
        found += f"; the federation asks for {wanted}"
    yield Finding("base weights", fits, found, mend)
    digest = file_sha256(path)
    if not pinned:
        yield Finding(
            "base weights: SHA-256",
            None,
            f"{digest}; the site pins none and takes what the federation names "
            f"(to pin it: checkpoint_sha256: {digest})",
        )
    elif digest == pinned.lower():
        yield Finding("base weights: SHA-256", True, f"{digest}, as pinned")
    else:
        yield Finding(
            "base weights: SHA-256",
            False,
            f"{digest}, but checkpoint_sha256 is {pinned}",
            "put the pinned file in place, or, once the federation has agreed on this one, write "
            "its SHA-256 into flap_site.yaml",
        )


def check_bundle(bundle: str) -> Iterator[Finding]:
    """Whether there is the config of a network that a federation with arch: bundle asks for.

    Args:
        bundle: the site's own file; empty where it names none.
    """
    there = bool(bundle) and Path(bundle).is_file()
    found = bundle or "the federation asks for arch: bundle, and no config of a network is named"
    if bundle and not there:
        found += ": there is no such file"
    mend = "" if there else "name a MONAI config with network_def as bundle in flap_site.yaml"
    yield Finding("own network", there, found, mend)
