"""Which of the known layouts a root has, and its cases: the one way from a root to a site's scans.

One file a layout: `kits`, `ixi`, `prostate`, `nnunet`. Scans in any other layout are listed by a
site's own code (`source`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flap_nvflare.data import ixi, kits, nnunet, prostate
from flap_nvflare.data.cases import ListedCase
from flap_nvflare.data.entries import Entry, cases_of_site, names_of_sites, placed
from flap_nvflare.data.errors import DataError


@dataclass(frozen=True)
class Layout:
    """A layout of files below a root.

    Attributes:
        name: as `flap-nvflare prepare` takes it.
        looks_for: what tells that a root has it, for messages.
        origin: where its data come from.
        is_at: whether a root has it; reads names only.
        entries: every case of a root, as its files and their names say.
        class_names: the foreground classes of a root's masks, label 1 first.
        grey_values: the federation's setting for a root's scans: `site` for CT, else `scan`.
        has_table: whether `sites.csv` says where a case is, not a table of the layout's own.
        split: what to know of a fixed fifth as test cases, such as where the published ones are.
    """

    name: str
    looks_for: str
    origin: str
    is_at: Callable[[Path], bool]
    entries: Callable[[Path], list[Entry]]
    class_names: Callable[[Path], tuple[str, ...]]
    grey_values: Callable[[Path], str]
    has_table: bool = True
    split: str = ""


# In the order in which they are tried: the last one looks through all folders.
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "kits",
            f"{kits.TABLE} beside case_00000/{kits.IMAGE}",
            "https://github.com/neheller/kits19, its table of sites "
            "https://github.com/owkin/FLamby (flamby/datasets/fed_kits19/metadata)",
            kits.is_kits,
            kits.kits_entries,
            lambda root: kits.CLASS_NAMES,
            lambda root: "site",
            has_table=False,
        ),
        Layout(
            "nnunet",
            f"{nnunet.DESCRIPTION} beside imagesTr and labelsTr",
            "the data set's own page; the Decathlon: http://medicaldecathlon.com",
            nnunet.is_nnunet,
            nnunet.nnunet_entries,
            nnunet.nnunet_class_names,
            nnunet.nnunet_grey_values,
            split="; of a patient with several cases, give all the same split",
        ),
        Layout(
            "prostate",
            f"folders {', '.join(prostate.TEST_CASES)} with Case00.nii.gz",
            "https://liuquande.github.io/SAML/",
            prostate.is_prostate,
            prostate.prostate_entries,
            lambda root: prostate.CLASS_NAMES,
            lambda root: "scan",
        ),
        Layout(
            "ixi",
            "files named like IXI012-HH-1211*.nii.gz",
            "https://brain-development.org/ixi-dataset/, or with masks IXI Tiny by TorchIO "
            "(torchio.datasets.IXITiny) or by FLamby (https://github.com/owkin/FLamby, "
            "flamby/datasets/fed_ixi)",
            ixi.is_ixi,
            ixi.ixi_entries,
            lambda root: ixi.CLASS_NAMES,
            lambda root: "scan",
            split=f"; the published cases are those of FLamby's {ixi.TABLE}, put into the root",
        ),
    )
}


def layout_of(root: Path | str) -> Layout:
    """The layout of a root; reads names only.

    Raises:
        DataError: if there is no such folder, or it has none of the layouts.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the folder with the scans as data_root")
    for layout in LAYOUTS.values():
        if layout.is_at(folder):
            return layout
    looked = "; ".join(f"{layout.looks_for} ({layout.name})" for layout in LAYOUTS.values())
    raise DataError(
        f"{folder}: no known layout of scans; looked for {looked}. Scans in another layout are "
        f"listed by the site's own site_data.py"
    )


def list_cases(root: Path | str, site: str | int) -> list[ListedCase]:
    """The cases of one site with their splits; reads names and tables, no scans.

    Args:
        root: folder with the scans, in one of the layouts.
        site: the site's name in its data.

    Raises:
        DataError: if the layout is not known, or the site, one of its cases or a table cannot be
            used.
    """
    layout, folder = layout_of(root), Path(root)
    if not layout.has_table:
        return kits.list_kits(folder, site)
    entries = placed(folder, layout.entries(folder), layout.name)
    return cases_of_site(folder, entries, str(site))


def site_names(root: Path | str) -> list[str]:
    """The sites whose cases a root holds, sorted.

    Raises:
        DataError: as `list_cases` does about the whole of a root.
    """
    layout, folder = layout_of(root), Path(root)
    if not layout.has_table:
        return kits.site_names(folder)
    return names_of_sites(placed(folder, layout.entries(folder), layout.name))


def known_masks(root: Path) -> set[Path]:
    """The masks that lie in a root of a known layout, none for any other folder."""
    try:
        return {mask for entry in layout_of(root).entries(root) for mask in entry.masks}
    except DataError:  # no data set, or one that is not whole: its files may still be looked at
        return set()
