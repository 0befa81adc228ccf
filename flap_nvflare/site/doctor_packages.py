"""Whether Python and the installed packages are those that this package asks for."""

from __future__ import annotations

import importlib.metadata as metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from flap_nvflare.site.finding import Finding

PACKAGE = "flap_nvflare"


def check_python(package: str = PACKAGE) -> Iterator[Finding]:
    """The interpreter's version against the package's `requires-python`."""
    version = platform.python_version()
    try:
        # Any version, where it asks for none.
        wanted = metadata.metadata(package)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        yield _not_installed("Python", package)
        return
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    mend = f"install Python {wanted} and {package} in it"
    yield Finding("Python", fits, f"{version}, asked for: {wanted}", "" if fits else mend)


def check_packages(package: str = PACKAGE) -> Iterator[Finding]:
    """Every package that this one needs, and those that they need, with their versions."""
    try:
        needed = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        yield _not_installed("packages", package)
        return
    wrong = dict(sorted(_unmet(package)))
    shown = []
    for one in map(Requirement, needed):
        if _applies(one, ""):
            shown.append(f"{one.name} {_version(one.name) or 'missing'}")
    if not wrong:
        yield Finding("packages", True, ", ".join(shown))
    for name, (found, requirement, asks) in wrong.items():
        mend = f"in FLARE's Python: pip install '{requirement}'"
        yield Finding(f"package {name}", False, f"{found}; {asks} asks for {requirement}", mend)


def _unmet(package: str) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Name, and what is found, asked for, and by whom, of all requirements that do not hold."""
    waiting: list[tuple[str, str]] = [(package, "")]
    seen = set(waiting)
    while waiting:
        asks, extra = waiting.pop()
        for requirement in map(Requirement, metadata.requires(asks) or []):
            if not _applies(requirement, extra):
                continue
            version = _version(requirement.name)
            plain = f"{requirement.name}{requirement.specifier}"
            if version is None:
                yield requirement.name, ("not installed", plain, asks)
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                yield requirement.name, (version, plain, asks)
            for step in [(requirement.name, name) for name in ("", *sorted(requirement.extras))]:
                if step not in seen:
                    seen.add(step)
                    waiting.append(step)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _not_installed(name: str, package: str) -> Finding:
    mend = f"in FLARE's Python: pip install {package}"
    return Finding(name, False, f"{package} is not installed in this Python", mend)
