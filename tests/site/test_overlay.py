"""The overlay laid over kits: what it writes, what it keeps, what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from startup_kits import COMPONENTS, OWN, local, write_kit

from flap_nvflare.cli import main
from flap_nvflare.settings import SettingsError
from flap_nvflare.site import overlay
from flap_nvflare.site.kit import read_kit
from flap_nvflare.site.overlay import Laid, lay, overlay_folder
from flap_nvflare.site.site_file import read_site_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    return write_kit(tmp_path / "kits" / "A")


def init(kit: Path, *arguments: str) -> int:
    return main(["site", "init", str(kit), *arguments])


def contents(kit: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(kit)): path.read_bytes() for path in kit.rglob("*") if path.is_file()
    }


def what(laid: list[Laid]) -> dict[str, str]:
    return {one.path.removeprefix("local/"): one.what for one in laid}


def test_a_site_gets_the_policy_and_keeps_what_flare_wrote(kit: Path) -> None:
    before = contents(kit)
    assert init(kit) == 0
    after = contents(kit)
    assert all(after[name] == content for name, content in before.items())
    resources = local(kit, "resources.json")
    assert resources["class_allow_list"][0] == OWN[0]
    assert "flap_nvflare.flare.executor.FlapExecutor" in resources["class_allow_list"]
    assert resources["allow_log_streaming"] is False
    assert {part["id"] for part in resources["components"]} >= {part["id"] for part in COMPONENTS}
    assert local(kit, "privacy.json")["default_scope"] == "flap"
    assert local(kit, "authorization.json")["permissions"]["lead"]["byoc"] == "none"
    ours = read_site_file(kit / "local" / "flap_site.yaml")
    assert ours.state_dir == kit.resolve() / "flap" / "state"
    assert ours.state_dir.is_dir()


def test_only_the_owner_reads_what_was_written(kit: Path) -> None:
    old = set(kit.rglob("*"))
    init(kit)
    new = [path for path in kit.rglob("*") if path not in old]
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in new}
    assert {modes[path.name] for path in new if path.is_file()} == {"0o600"}
    assert {modes[path.name] for path in new if path.is_dir()} == {"0o700"}


def test_a_second_run_changes_nothing(kit: Path) -> None:
    init(kit)
    before = contents(kit)
    found = lay(read_kit(kit))
    assert contents(kit) == before
    assert set(what(found).values()) == {"unchanged"}


def test_edits_of_the_hospital_stay(kit: Path, tmp_path: Path) -> None:
    init(kit, "--device", "cuda")
    file, source = kit / "local" / "flap_site.yaml", kit / "local" / "custom" / "site_data.py"
    file.write_text(file.read_text().replace("min_cases: 1", "min_cases: 7  # the board's wish"))
    source.write_text("# ours\n" + source.read_text())
    (tmp_path / "scans").mkdir()
    found = lay(read_kit(kit), {"data_root": str(tmp_path / "scans")})
    ours = read_site_file(file)
    assert (ours.limits.min_cases, ours.device) == (7, "cuda")
    assert ours.data_root == tmp_path / "scans"
    assert "the board's wish" in file.read_text()
    assert source.read_text().startswith("# ours\n")
    assert what(found)["custom/site_data.py"] == "kept"
    assert what(found)["flap_site.yaml"] == "updated"


def test_edits_of_flares_own_file_stay(kit: Path) -> None:
    init(kit)
    path = kit / "local" / "resources.json"
    path.write_text(path.read_text().replace('"restarts": 3', '"restarts": 0'))
    for _ in range(2):
        init(kit, "--device", "cpu")
        (launcher,) = (
            one
            for one in local(kit, "resources.json")["components"]
            if one["id"] == "process_launcher"
        )
        assert launcher["args"] == {"restarts": 0, "wait": 2.0}


def test_the_line_in_force_is_changed_and_not_the_remark_above_it(kit: Path) -> None:
    init(kit)
    file = kit / "local" / "flap_site.yaml"
    file.write_text(file.read_text() + "device: cuda:0\n")
    init(kit, "--device", "cpu")
    assert read_site_file(file).device == "cpu"
    file.write_text(file.read_text() + "device: cuda:0\n")
    with pytest.raises(SettingsError, match="device is there twice"):
        read_site_file(file)


def test_a_policy_of_the_hospital_is_replaced_only_by_force(kit: Path) -> None:
    path = kit / "local" / "privacy.json"
    path.write_text('{"scopes": []}')
    assert what(lay(read_kit(kit)))["privacy.json"] == "kept"
    assert local(kit, "privacy.json") == {"scopes": []}
    assert what(lay(read_kit(kit), force=True))["privacy.json"] == "updated"
    assert local(kit, "privacy.json")["default_scope"] == "flap"
    assert local(kit, "privacy.json.before") == {"scopes": []}


def test_a_file_as_it_was_laid_follows_the_package(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init(kit)
    newer = tmp_path / "newer"
    shutil.copytree(overlay_folder(), newer)
    policy = json.loads((newer / "local" / "privacy.json").read_text())
    policy["components"] = [{"id": "last_gate"}]
    (newer / "local" / "privacy.json").write_text(json.dumps(policy))
    monkeypatch.setattr(overlay, "overlay_folder", lambda: newer)
    assert what(lay(read_kit(kit)))["privacy.json"] == "updated"
    assert local(kit, "privacy.json")["components"] == [{"id": "last_gate"}]


def test_the_checkpoint_is_pinned_by_its_sum(kit: Path, tmp_path: Path) -> None:
    weights = tmp_path / "sam vit_b: 'x'.pth"
    for content in (b"weights", b"others"):
        weights.write_bytes(content)
        assert init(kit, "--checkpoint", str(weights)) == 0
        ours = read_site_file(kit / "local" / "flap_site.yaml")
        assert ours.checkpoint == str(weights)
        assert ours.checkpoint_sha256 == hashlib.sha256(content).hexdigest()


def test_a_server_keeps_its_jobs_in_its_kit(tmp_path: Path) -> None:
    kit = write_kit(tmp_path / 'a "server"', "server")
    assert init(kit) == 0
    resources = local(kit, "resources.json")
    components = {part["id"]: part for part in resources["components"]}
    assert components["job_manager"]["args"] == {
        "uri_root": f"{kit}/flap/jobs", "job_store_id": "job_store",
    }  # fmt: skip
    assert components["job_scheduler"]["args"] == {"max_jobs": 4}
    storage = resources["snapshot_persistor"]["args"]["storage"]
    assert storage["args"]["root_dir"] == f"{kit}/flap/snapshots"
    assert storage["path"] == "nvflare.x.Storage"
    assert "/tmp/nvflare" not in json.dumps(resources)
    assert not (kit / "local" / "flap_site.yaml").exists()
    assert local(kit, "authorization.json")["permissions"]["project_admin"]["byoc"] == "none"


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("admin", [], "administrator's kit"),
        ("other", [], "no FLARE startup kit"),
        ("server", ["--device", "cpu"], "a server's kit"),
        ("client", ["--data-root", "{none}"], "--data-root {none}: no such folder"),
        ("client", ["--checkpoint", "{none}"], "--checkpoint {none}: no such file"),
        ("client", ["--device", "gpu"], "device is 'gpu'"),
    ],
)
def test_what_is_refused_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    arguments: list[str],
    said: str,
) -> None:
    kit = write_kit(tmp_path / "kit", kind)
    before, none = contents(kit), str(tmp_path / "none")
    assert init(kit, *(argument.format(none=none) for argument in arguments)) == 1
    assert said.format(none=none) in capsys.readouterr().err
    assert contents(kit) == before
    assert not (kit / "flap").exists()


def test_a_damaged_file_of_the_kit_is_named(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kit / "local" / "resources.json").write_text("{")
    assert init(kit) == 1
    assert "resources.json: cannot be read as JSON" in capsys.readouterr().err


def test_json_tells_what_became_of_each_file(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(kit, "--json") == 0
    assert {row["what"] for row in json.loads(capsys.readouterr().out)} == {"wrote"}


def test_the_package_holds_every_room_and_the_overlay() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.search(r"^packages = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert named is not None
    rooms = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "flap_nvflare").rglob("__init__.py")
    }
    assert set(re.findall(r'"([\w.]+)"', named[1])) == rooms | {"flap_nvflare.site.custom"}
    assert '"flap_nvflare.site.custom" = "custom"' in text
    installed = overlay_folder()  # of the package that runs here: a wheel's, or the checkout's
    for path in (ROOT / "custom").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            found = installed / path.relative_to(ROOT / "custom")
            assert found.read_bytes() == path.read_bytes()
