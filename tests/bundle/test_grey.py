"""Where a scan's grey values come from, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from layout_files import write_prostate

from flap_nvflare.bundle.grey import choose_window
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.window import KITS_WINDOWS, Window
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.site_data import SiteData

KIDNEYS = Federation()


def test_as_given_and_by_the_name_of_a_site() -> None:
    assert choose_window(KIDNEYS, [-50, 150, 40.5, 30])[0] == Window(-50, 150, 40.5, 30)
    assert choose_window(KIDNEYS, site="b") == (KITS_WINDOWS["B"], "site B of Fed-KiTS2019")


def test_the_default_is_the_mean_of_six_sites() -> None:
    window, why = choose_window(KIDNEYS)
    # (66 + 77 + 89 + 64 + 64 + 82) / 6 = 73.67 and so on.
    assert window == Window(-73.7, 266.7, 100.4, 72.2)
    assert why == "mean over the sites of Fed-KiTS2019"


def test_other_classes_have_no_default() -> None:
    prostate = Federation(class_names=("prostate",))
    with pytest.raises(DataError, match=r"prostate have no usual grey values; give --window"):
        choose_window(prostate)
    assert choose_window(prostate, [0, 10, 5, 2])[0] == Window(0, 10, 5, 2)


def test_a_sites_own_training_cases(federation: Federation, site: Site) -> None:
    window, why = choose_window(federation, site="A", data_root=site.data_root)
    assert window == SiteData(federation, site).window("A")
    assert why == "training cases of site A"


def test_a_site_of_another_layout(tmp_path: Path) -> None:
    root = write_prostate(tmp_path / "prostate", {"HK": [38, 39, 40], "UCL": [1, 2]})
    window, why = choose_window(Federation(class_names=("prostate",)), site="HK", data_root=root)
    assert 80 < window.low < window.mean < window.high < 120
    assert why == "training cases of site HK"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": [0, 1, 0, 1], "site": "A"}, "--window excludes"),
        ({"data_root": Path("scans")}, "--data-root scans: name one of its sites"),
        ({"site": "A+B", "data_root": Path("scans")}, "--site A+B: pooled sites"),
        ({"site": "Q"}, "--site Q is none of Fed-KiTS2019"),
        ({"values": [5, 1, 0, 1]}, "low < high"),
        ({"site": "A", "data_root": Path("/nowhere")}, "/nowhere: no such folder"),
    ],
)
def test_options_that_name_no_window(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        choose_window(KIDNEYS, **options)


def test_scans_with_a_window_each_have_none_to_choose() -> None:
    by_scan = Federation(grey_values="scan", class_names=("prostate",))
    assert choose_window(by_scan) == (None, "of each scan itself")
    for options in ({"values": [0, 1, 0, 1]}, {"site": "A"}, {"data_root": Path("scans")}):
        with pytest.raises(DataError, match=r"grey_values: scan, .* leave out --window, --site"):
            choose_window(by_scan, **options)  # type: ignore[arg-type]
