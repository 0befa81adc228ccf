"""The site's own file: every key read, every bad one named with its mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from flap_nvflare.settings import SettingsError, Site
from flap_nvflare.site.limits import PLAIN_RANGES
from flap_nvflare.site.overlay import overlay_folder
from flap_nvflare.site.site_file import SITE_FILE, Limits, SiteFile, read_site_file


def written(folder: Path, text: str) -> Path:
    path = folder / SITE_FILE
    path.write_text(text, encoding="utf-8")
    return path


def test_every_key_arrives(tmp_path: Path) -> None:
    found = read_site_file(
        written(
            tmp_path,
            f"""
data_root: /scans
checkpoint: /models/sam.pth
checkpoint_sha256: '{"aB" * 32}'
device: cuda
state_dir: /state
site: 3
processes: 2
cache_gb: 1
workers: 4
checkpointing: on
packed: off
allow_synthetic: true
limits:
  min_cases: 5
  max_update_mb: 8
  methods: [flap, lora]
  ranges: {{rank: [4, 16], learning_rate: [1e-5, 1e-2]}}
  choices: {{encryption: [he], rule: [svd, mean]}}
  dp_clip: 1
  dp_noise: 0.5
""",
        )
    )
    limits = found.limits
    assert (found.data_root, found.state_dir) == (Path("/scans"), Path("/state"))
    assert (found.checkpoint, found.checkpoint_sha256) == ("/models/sam.pth", "ab" * 32)
    assert found.hardware().items() >= {
        "device": "cuda", "processes": 2, "cache_gb": 1.0, "workers": 4, "checkpointing": "on",
        "channels_last": "auto", "packed": "off", "compile": "auto",
    }.items()  # fmt: skip
    assert (found.site, found.allow_synthetic) == ("3", True)
    assert (limits.min_cases, limits.max_update_mb, limits.methods) == (5, 8, ("flap", "lora"))
    assert limits.ranges == {**PLAIN_RANGES, "rank": (4, 16), "learning_rate": (1e-5, 1e-2)}
    assert limits.choices == {"encryption": ("he",), "rule": ("svd", "mean")}
    assert (limits.dp_clip, limits.dp_noise) == (1, 0.5)


@pytest.mark.parametrize("text", ["", "# nothing\n", "data_root:\nlimits:\n"])
def test_what_is_not_said_has_the_plain_values(tmp_path: Path, text: str) -> None:
    assert read_site_file(written(tmp_path, text)) == SiteFile()


def test_the_file_of_the_overlay_says_what_holds_without_it() -> None:
    assert read_site_file(overlay_folder() / "local" / SITE_FILE) == SiteFile(limits=Limits())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data_rot: /scans", "data_rot: '/scans' is not known; expected one of"),
        ("- data_root", "the file is ['data_root']; give lines of 'name: value'"),
        ("data_root: [", "cannot be read as YAML"),
        ("data_root: scans", "data_root is 'scans'; give a full path"),
        ("data_root: 3", "data_root is 3; give text"),
        ("checkpoint_sha256: abc", "checkpoint_sha256 is 'abc'; give the 64"),
        ("device: gpu", "device is 'gpu'; give cpu, cuda"),
        ("processes: 1.5", "processes is 1.5; give a whole number"),
        ("processes: true", "processes is True; give a whole number"),
        ("processes: 0", "processes: 0"),
        ("processes: 2\ndevice: cuda:1", "device: 'cuda:1'"),
        ("workers: many", "workers is 'many'; give a whole number"),
        ("cache_gb: -1", "cache_gb: -1"),
        ("packed: maybe", "packed is 'maybe'; give one of"),
        ("allow_synthetic: 1", "allow_synthetic is 1; give true or false"),
        ("site: a/b", "site is 'a/b'; give"),
        ("limits: 3", "limits is 3; give lines"),
        ("limits: {cases: 3}", "limits.cases: 3 is not known"),
        ("limits: {min_cases: 0}", "limits.min_cases is 0; give a number from 1"),
        ("limits: {min_cases: 1.5}", "limits.min_cases is 1.5; give a whole number"),
        ("limits: {min_cases: few}", "limits.min_cases is 'few'"),
        ("limits: {max_update_mb: .nan}", "limits.max_update_mb is nan"),
        ("limits: {methods: flap}", "limits.methods is 'flap'; give a list"),
        ("limits: {methods: [flop]}", "limits.methods is ['flop']; give a list of some of"),
        ("limits: {methods: []}", "limits.methods is []"),
        ("limits: {ranges: {rank: 4}}", "limits.ranges.rank is 4; give a list"),
        ("limits: {ranges: {rank: [9, 4]}}", "limits.ranges.rank is [9, 4]; give [lowest,"),
        ("limits: {ranges: {rank: [4]}}", "limits.ranges.rank is [4]"),
        ("limits: {ranges: {rank: [0, 4]}}", "both from 1 to 1024"),
        ("limits: {ranges: {rank: [1, .nan]}}", "limits.ranges.rank"),
        ("limits: {ranges: {rang: [1, 4]}}", "limits.ranges is 'rang'"),
        ("limits: {choices: {rank: [a]}}", "limits.choices is 'rank'"),
        ("limits: {choices: {method: [flap]}}", "methods are in 'methods'"),
        ("limits: {choices: {encryption: [rot13]}}", "limits.choices.encryption is ['rot13']"),
        ("limits: {choices: {rule: []}}", "limits.choices.rule is []"),
        ("limits: {dp_noise: 1}", "limits.dp_noise is 1; give a dp_clip above 0"),
    ],
)
def test_a_bad_key_or_value_is_named_with_its_mend(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        read_site_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / SITE_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=SITE_FILE):
        read_site_file(tmp_path / SITE_FILE)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_site_file(tmp_path / "none.yaml")


def test_the_defaults_are_those_of_a_site() -> None:
    site = Site("A", Path())
    assert all(getattr(site, name) == value for name, value in SiteFile().hardware().items())
