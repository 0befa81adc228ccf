"""Looks at a hospital's machine before the first job: what is wrong, and what to do about it.

Each check is a small function that yields findings; here is which of them are asked, and in what
order. Findings may name cases and paths, for they stay on the hospital's own console. The one
thing that goes out is a handshake with the federation's server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flap_nvflare.data.source import SOURCE_FILE
from flap_nvflare.settings import (
    BUNDLE_VARIABLE,
    CHECKPOINT_VARIABLE,
    DATA_VARIABLE,
    OWN_NETWORK,
    Federation,
)
from flap_nvflare.site import (
    doctor_certificate,
    doctor_data,
    doctor_machine,
    doctor_network,
    doctor_overlay,
    doctor_packages,
    doctor_picture,
    doctor_weights,
)
from flap_nvflare.site.finding import Finding, guarded
from flap_nvflare.site.kit import Kit, home, read_kit
from flap_nvflare.site.site_file import SITE_FILE, SiteFile, read_site_file

__all__ = ["PICTURE", "Finding", "Questions", "checks"]

PICTURE = Path("flap") / "doctor.png"
# As `flare.context.home`, which imports FLARE.


@dataclass(frozen=True)
class Questions:
    """What to look at besides a kit; empty values are taken from the kit's own file.

    Attributes:
        data_root: folder with the scans.
        checkpoint: file of SAM's weights.
        site: the site's name in the table of cases; without a kit, empty for all of them.
        federation: the settings of a job to come; None where they aren't known yet.
        picture: PNG to write; None for `PICTURE` in the kit.
        timeout: seconds to wait for the server.
        watch: wraps the cases to show how far the reading is.
    """

    data_root: str = ""
    checkpoint: str = ""
    site: str = ""
    federation: Federation | None = None
    picture: Path | None = None
    timeout: float = doctor_network.TIMEOUT
    watch: doctor_data.Watch = list

    def settings(self, checkpoint: str) -> Federation:
        """The job's settings, or those of the profile that such a checkpoint goes with."""
        profile = "paper" if checkpoint else "demo"
        return self.federation or Federation.of_profile(profile)


def checks(kit: Path | None, questions: Questions | None = None) -> list[Finding]:
    """The findings, in the order in which they are best read.

    Args:
        kit: startup kit of a site or of the server; None looks at the machine alone.
        questions: what else to look at.

    Raises:
        SettingsError: if `kit` is no kit of a site or a server.
    """
    return list(_checks(kit, questions or Questions()))


def _checks(folder: Path | None, questions: Questions) -> Iterator[Finding]:
    kit = None if folder is None else read_kit(folder.absolute())
    yield from guarded("Python", doctor_packages.check_python)
    yield from guarded("packages", doctor_packages.check_packages)
    yield from guarded("open files", doctor_machine.check_open_files)
    if kit is not None:
        yield from _of_kit(kit, questions)
    if kit is not None and kit.server:
        yield from guarded("clock", lambda: doctor_network.check_clock(kit, kit.folder))
        yield Finding("site", None, "a server's kit: it has neither scans nor weights")
        return
    if kit is None:
        yield Finding("kit", None, "none is named: certificate, server and overlay are not checked")
        file: SiteFile | None = SiteFile()
    else:
        read, file = _site_file(kit)
        yield read
    if file is None:
        yield Finding("site", None, f"{SITE_FILE} can't be read: its scans and weights are unknown")
        return
    yield from _of_site(kit, file, questions)


def _of_kit(kit: Kit, questions: Questions) -> Iterator[Finding]:
    """What the federation gave, and what is laid over it."""
    yield from guarded("kit", lambda: _complete(kit))
    yield from guarded("user", lambda: doctor_machine.check_user(kit.folder))
    yield from guarded("certificate", lambda: doctor_certificate.check_certificate(kit))
    yield from guarded("private key", lambda: doctor_certificate.check_key(kit))
    yield from guarded("signatures", lambda: doctor_certificate.check_signatures(kit))
    yield from guarded("allow-list", lambda: doctor_overlay.check_allow_list(kit))
    yield from guarded(
        "writing: kit", lambda: doctor_machine.check_writing("writing: kit", kit.folder)
    )
    own = kit.folder / PICTURE.parent
    yield from guarded("writing: flap", lambda: doctor_machine.check_writing("writing: flap", own))
    if not kit.server:
        yield from guarded("gate", lambda: doctor_overlay.check_gate(kit))
    yield from guarded("code in jobs", lambda: doctor_overlay.check_custom_code(kit))
    yield from guarded("files here", lambda: doctor_overlay.check_files(kit))
    if kit.server:
        yield from guarded("port", lambda: doctor_network.check_listening(kit))
        return
    yield from guarded("server", lambda: doctor_network.check_server(kit, questions.timeout))


def _of_site(kit: Kit | None, file: SiteFile, questions: Questions) -> Iterator[Finding]:
    """The site's own: its weights, its scans, and the machine that they must fit in."""
    state = file.state_dir or home(kit) / "state"
    yield from guarded("clock", lambda: doctor_network.check_clock(kit, state))
    yield from guarded("device", lambda: doctor_machine.check_device(file.device, file.processes))
    checkpoint = questions.checkpoint or file.checkpoint or os.environ.get(CHECKPOINT_VARIABLE, "")
    settings = questions.settings(checkpoint)
    asked = questions.federation
    if asked is not None and kit is not None:
        yield from guarded("limits", lambda: _limits(file, asked))
    if asked is not None and asked.arch == OWN_NETWORK:
        bundle = str(file.bundle or ("" if kit else os.environ.get(BUNDLE_VARIABLE, "")))
        yield from guarded("own network", lambda: doctor_weights.check_bundle(bundle))
    elif asked is None or asked.base == "pretrained":
        wanted = asked.arch if asked else ""
        pinned = file.checkpoint_sha256
        yield from guarded(
            "base weights", lambda: doctor_weights.check_weights(checkpoint, pinned, wanted)
        )
    scans = doctor_data.Scans()
    yield from _of_scans(kit, file, questions, settings, scans)
    needs = scans.needs(_size(checkpoint))
    yield from guarded("memory", lambda: doctor_machine.check_memory(needs, settings))
    yield from guarded(
        "writing: state_dir", lambda: doctor_machine.check_writing("writing: state_dir", state)
    )
    yield from guarded(
        "disk", lambda: doctor_machine.check_disk(state, needs, settings, file.cache_gb)
    )


def _of_scans(
    kit: Kit | None,
    file: SiteFile,
    questions: Questions,
    settings: Federation,
    scans: doctor_data.Scans,
) -> Iterator[Finding]:
    """The scans, wherever they are named; `scans` takes up what they are."""
    place = questions.data_root or file.data_root or os.environ.get(DATA_VARIABLE, "")
    if not place:
        yield _no_scans(kit, file)
        return
    site = questions.site or file.site or (kit.name if kit else "")
    source = kit.local / "custom" / SOURCE_FILE if kit else None
    if source is not None and not source.is_file():
        source = None
    root, least = Path(place), file.limits.min_cases
    yield from guarded(
        "cases", lambda: doctor_data.check_cases(root, site, settings, least, scans, source)
    )
    yield from guarded("scans", lambda: doctor_data.check_scans(settings, scans, questions.watch))
    names = settings.class_names
    yield from guarded("picture", lambda: _picture(kit, questions, scans, names))


def _no_scans(kit: Kit | None, file: SiteFile) -> Finding:
    if kit is None:
        return Finding("cases", None, "no --data-root is named")
    if file.allow_synthetic:
        return Finding("cases", None, "no data_root: a rehearsal on synthetic scans, as allowed")
    mend = f"write 'data_root: FOLDER' into {kit.local / SITE_FILE}"
    return Finding("cases", False, "the site names no folder of scans", mend)


def _limits(file: SiteFile, federation: Federation) -> Iterator[Finding]:
    """Whether the site's own file lets it do what the job will ask for."""
    try:
        file.limits.check(federation)
    except RuntimeError as error:
        mend = f"agree on the setting, or change limits in {SITE_FILE} if the hospital does"
        yield Finding("limits", False, str(error), mend)
        return
    yield Finding("limits", True, "the site's file allows what this federation asks for")


def _complete(kit: Kit) -> Iterator[Finding]:
    missing = kit.missing()
    what = "the server" if kit.server else f"site {kit.name}"
    if missing:
        found = f"{kit.folder}, of {what}, lacks {', '.join(missing)}"
        yield Finding("kit", False, found, "unpack the kit again, whole")
    else:
        yield Finding("kit", True, f"{kit.folder}, of {what}")


def _site_file(kit: Kit) -> tuple[Finding, SiteFile | None]:
    path = kit.local / SITE_FILE
    if not path.is_file():
        finding = Finding("site file", False, f"{path}: missing", doctor_overlay.lay(kit))
        # What the command line names can be checked without it.
        return finding, SiteFile()
    found: list[SiteFile] = []

    def read() -> Iterator[Finding]:
        found.append(read_site_file(path))
        yield Finding("site file", True, f"{path}")

    (finding,) = guarded("site file", read)
    return finding, found[0] if found else None


def _picture(
    kit: Kit | None, questions: Questions, scans: doctor_data.Scans, class_names: Sequence[str]
) -> Iterator[Finding]:
    path = questions.picture or (kit.folder / PICTURE if kit else None)
    if path is None:
        yield Finding("picture", None, "no --picture is named")
        return
    if scans.sample is None:
        yield Finding("picture", None, "no training case can be read")
        return
    doctor_picture.write_picture(path, scans.sample, class_names)
    found = (
        f"{path}: three slices of {scans.sample.name} with their masks; look whether organ, sides "
        "and mask are right, then delete it: it shows a patient (mode 600)"
    )
    yield Finding("picture", True, found)


def _size(checkpoint: str) -> float:
    path = Path(checkpoint) if checkpoint else None
    return float(path.stat().st_size) if path is not None and path.is_file() else 0.0
