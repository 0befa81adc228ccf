"""The name of a job's runs, which becomes part of paths at the server and at every site."""

from __future__ import annotations

import re

from flap_nvflare.settings import SettingsError

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,100}")


def plain_name(name: object) -> str:
    """The name itself.

    Raises:
        SettingsError: if it could lead elsewhere.
    """
    if not (isinstance(name, str) and _PLAIN.fullmatch(name)):
        raise SettingsError(
            f"the name of the runs, {repr(name)[:80]}, is not allowed; give 1 to 100 of the "
            "letters a to z, digits, _ and -"
        )
    return name
