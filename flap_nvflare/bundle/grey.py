"""The grey values of a scan that belongs to no site: which window the network sees it through.

With `grey_values` `site` a site's window comes from its own training cases, and it never leaves the
site. So the file of an adapter cannot say it, and whoever predicts, or exports what will, has to.
With `scan` each scan has its own, and nobody has to say anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.window import KITS_WINDOWS, MEAN_KITS_WINDOW, Window
from flap_nvflare.settings import Federation
from flap_nvflare.training.site_data import POOL

OPTIONS = (
    "--window LOW HIGH MEAN STD (HU), --site with a letter of Fed-KiTS2019, or --data-root FOLDER "
    "and --site to read it off that site's training cases"
)
OF_EACH_SCAN = "of each scan itself"


def choose_window(
    federation: Federation,
    values: Sequence[float] | None = None,
    site: str = "",
    data_root: Path | None = None,
) -> tuple[Window | None, str]:
    """The window, None if each scan has its own, and where it comes from.

    Args:
        federation: settings of the adapter.
        values: low, high, mean and std in HU, before all else.
        site: with `data_root` a site there; without it one of Fed-KiTS2019.
        data_root: folder with a site's training cases.

    Raises:
        DataError: if the options do not name one window, there is no default for these classes, or
            each scan has its own.
    """
    if federation.grey_values == "scan":
        if values is not None or site or data_root:
            raise DataError(
                "the adapter was trained with grey_values: scan, every scan scaled by itself, so "
                "there is no window to choose; leave out --window, --site and --data-root"
            )
        return None, OF_EACH_SCAN
    if values is not None:
        if site or data_root:
            raise DataError("--window excludes --site and --data-root; give one of them")
        return Window(*values), "as given"
    if data_root is not None:
        if not site:
            raise DataError(f"--data-root {data_root}: name one of its sites by --site")
        if POOL in site:
            raise DataError(f"--site {site}: pooled sites have a window each; name one of them")
        return site_window(federation, site, data_root), f"training cases of site {site}"
    if site:
        if site.upper() not in KITS_WINDOWS:
            raise DataError(
                f"--site {site} is none of Fed-KiTS2019 ({', '.join(KITS_WINDOWS)}); give {OPTIONS}"
            )
        return KITS_WINDOWS[site.upper()], f"site {site.upper()} of Fed-KiTS2019"
    if tuple(federation.class_names) == ("kidney", "tumour"):
        return MEAN_KITS_WINDOW, "mean over the sites of Fed-KiTS2019"
    raise DataError(
        f"classes {', '.join(federation.class_names)} have no usual grey values; give {OPTIONS}"
    )


def site_window(federation: Federation, site: str, data_root: Path) -> Window:
    """The window that the site itself trains with; reads its training cases one by one."""
    from flap_nvflare.bundle.builders import make_site
    from flap_nvflare.data.volume import load_volume
    from flap_nvflare.data.window import foreground_window
    from flap_nvflare.training.site_data import SiteData

    data = SiteData(federation, make_site(site, data_root))
    return foreground_window(load_volume(case, federation.classes) for case in data.cases.train)
