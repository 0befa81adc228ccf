"""What the README says that can be looked up: figures of a transfer, files, settings, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flap_nvflare.experiments.grid import find_grid
from flap_nvflare.sam.checkpoint import PACKAGED, file_sha256
from flap_nvflare.sam.tuning import count
from flap_nvflare.settings import Federation

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "custom" / "README.md",
    *sorted((ROOT / "flap_nvflare").glob("*/README.md")),
]


def test_the_table_of_methods_is_what_count_prints() -> None:
    for row in count("vit_b", 224, 2, 32):
        line = f"{row.method} | {row.parameters:,} | {row.bytes:,} | {row.reduction:.1f}"
        assert line in README.replace("*", ""), row.method


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_page_links_to_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links or path.parent != ROOT
    for link in links:
        name, _, heading = link.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), link
        if heading:
            headings = re.findall(
                r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE
            )
            slugs = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}
            assert heading in slugs, link


def test_every_module_and_test_that_a_page_runs_is_there() -> None:
    whole = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    modules = re.findall(r"python -m (flap_nvflare[.\w]*)", whole)
    paths = re.findall(r"pytest (?:-n 0 )?-m slow (tests/\S+\.py)", whole)
    assert modules
    assert paths
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    assert all((ROOT / path).is_file() for path in paths)


def test_every_setting_that_a_page_changes_exists() -> None:
    whole = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = {
        name
        for line in re.findall(r"--set ([^`\n]+)", whole)
        for name in re.findall(r"(\w+)=", line)
    }
    assert names
    assert names <= set(Federation().to_dict())


def test_every_grid_that_a_page_runs_is_there() -> None:
    whole = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = set(re.findall(r"flap-nvflare experiment ([a-z_]+)\b(?!\.)", whole))
    assert {"methods", "pretraining", "speed", "figure_one"} <= names
    for name in names:
        assert find_grid(name).is_file()


def test_the_weights_are_those_it_names() -> None:
    assert file_sha256(PACKAGED) in README
    assert PACKAGED.stat().st_size <= 4_000_000
