"""What `site show` says: in words and as JSON, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from startup_kits import local, write_kit

from flap_nvflare.cli import main
from flap_nvflare.sam.tuning import METHODS, count
from flap_nvflare.settings import SettingsError
from flap_nvflare.site.kit import read_kit
from flap_nvflare.site.overlay import lay
from flap_nvflare.site.policy import read_policy
from flap_nvflare.site.show import EXAMPLE, lines, methods, statement


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    kit = write_kit(tmp_path / "A")
    lay(read_kit(kit), {"data_root": str(tmp_path)})
    return kit


def change(kit: Path, name: str, **values: Any) -> None:
    (kit / "local" / name).write_text(json.dumps({**local(kit, name), **values}))


def limit(kit: Path, before: str, after: str) -> None:
    path = kit / "local" / "flap_site.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_counts_are_those_of_the_paper() -> None:
    rows = {row["method"]: row for row in methods(tuple(METHODS))}
    for row in count(**EXAMPLE):
        assert (rows[row.method]["numbers"], rows[row.method]["bytes"]) == (
            row.parameters,
            row.bytes,
        )
    assert rows["flap"]["tensors"] == rows["lora"]["tensors"] + rows["partial_decoder"]["tensors"]
    assert all(row["parts"] for row in rows.values())


def test_in_plain_words(kit: Path, tmp_path: Path) -> None:
    every = "[attention, decoder, partial_decoder, lora, lora_decoder, flap]"
    limit(kit, every, "[flap, attention]")
    text = "\n".join(lines(read_kit(kit)))
    assert "flap: 109 tensors, 1,846,384 numbers, 7.39 MB: output layers" in text
    assert "attention: 154 tensors, 31,681,152 numbers, 126.72 MB, too large to leave" in text
    assert "lora:" not in text
    assert f"scans: {tmp_path}" in text
    assert f"listed by: {kit}/local/custom/site_data.py" in text
    assert "rank: from 1 to 256" in text
    assert "[ok]   custom code in jobs: off" in text
    assert "[ok]   FLARE uploads no log of this site" in text
    assert text.endswith("Site-side code wins over anything a job says.")


def test_what_a_site_asks_for_is_said(kit: Path) -> None:
    limit(kit, "choices: {}", "choices: {encryption: [he]}")
    limit(kit, "dp_clip: 0\n", "dp_clip: 1\n")
    text = "\n".join(lines(read_kit(kit)))
    assert "encrypted only: the server sees sums" in text
    assert "clip at most 1, noise at least 0" in text


def test_a_rehearsal_is_called_one(tmp_path: Path) -> None:
    kit = write_kit(tmp_path / "A")
    lay(read_kit(kit))
    assert "none named: this site takes no part" in "\n".join(lines(read_kit(kit)))
    limit(kit, "# allow_synthetic: false", "allow_synthetic: true")
    assert "SYNTHETIC" in "\n".join(lines(read_kit(kit)))


def test_as_json(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "show", str(kit), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["name"] == "A"
    assert said["policy"]["roles_with_code"] == []
    assert said["limits"]["min_cases"] == 1
    assert {row["method"] for row in said["leaves"]["tensors"]} == set(METHODS) - {"full"}
    assert said == statement(read_kit(kit))


def test_a_bare_kit_is_open_and_said_to_be(tmp_path: Path) -> None:
    kit = read_kit(write_kit(tmp_path / "A"))
    policy = read_policy(kit)
    assert policy.roles_with_code == ("project_admin", "lead")
    assert policy.roles_with_files == ("project_admin",)
    assert policy.uploads_logs
    assert not policy.gate
    with pytest.raises(SettingsError, match=r"flap_site\.yaml"):
        statement(kit)


@pytest.mark.parametrize(
    ("allowed", "loose"),
    [
        (["flap_nvflare."], ["flap_nvflare."]),
        (["flap_nvflare"], ["flap_nvflare"]),
        (["flap_nvflare.flare.", "a."], ["flap_nvflare.flare."]),
        (["flap_nvflare.cli.main"], ["flap_nvflare.cli.main"]),
        (["flap_nvflare.flare.executor.FlapExecutor", "flap_nvflare_x."], []),
    ],
)
def test_a_list_that_allows_functions_is_warned_of(
    kit: Path, allowed: list[str], loose: list[str]
) -> None:
    change(kit, "resources.json", class_allow_list=allowed)
    assert list(read_policy(read_kit(kit)).loose_components) == loose
    text = "\n".join(lines(read_kit(kit)))
    assert ("[MEND] a job may call any function" in text) == bool(loose)


@pytest.mark.parametrize(
    "resources", [{"class_allow_list": ["*"]}, {"class_list_enforcement_mode": "warn"}]
)
def test_a_list_that_is_not_enforced_is_warned_of(kit: Path, resources: dict[str, Any]) -> None:
    assert read_policy(read_kit(kit)).components_enforced
    change(kit, "resources.json", **resources)
    assert not read_policy(read_kit(kit)).components_enforced


def test_a_gate_counts_only_in_every_scope_and_both_ways(kit: Path) -> None:
    assert read_policy(read_kit(kit)).gate
    good = local(kit, "privacy.json")["scopes"][0]
    for scopes, default in (
        ([good, {"name": "open"}], "flap"),
        ([{**good, "task_data_filters": []}], "flap"),
        ([{**good, "task_result_filters": [{"path": "a.B"}]}], "flap"),
        ([good], ""),
        ([], "flap"),
    ):
        change(kit, "privacy.json", scopes=scopes, default_scope=default)
        assert not read_policy(read_kit(kit)).gate


def test_the_last_gate_counts_where_flare_builds_it_for_a_job(kit: Path) -> None:
    last = {"id": "last_gate", "path": "flap_nvflare.flare.last_gate.LastGate"}
    change(kit, "privacy.json", components=[last])
    assert read_policy(read_kit(kit)).last_gate
    change(kit, "privacy.json", components=[{**last, "disabled": True}])
    assert not read_policy(read_kit(kit)).last_gate
    change(kit, "privacy.json", components=[last], scopes=[])
    assert not read_policy(read_kit(kit)).last_gate


def test_a_server_has_no_scans_to_speak_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = write_kit(tmp_path / "server", "server")
    lay(read_kit(kit))
    assert main(["site", "show", str(kit)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Server server.org")
    assert "What may leave" not in text
    assert "[MEND]" not in text
    assert main(["site", "show", str(kit), "--json"]) == 0
    assert "leaves" not in json.loads(capsys.readouterr().out)


def test_what_may_leave_of_a_sites_own_network(kit: Path, tmp_path: Path) -> None:
    assert "named:" not in "\n".join(lines(read_kit(kit)))
    assert statement(read_kit(kit))["leaves"]["own_network"] == {}
    limit(kit, "lora_decoder, flap]", 'named]\n  parameters: ["final_conv.*", "upcat_1.*"]')
    text = " ".join("\n".join(lines(read_kit(kit))).split())
    assert "named: of this site's own network the parameters that the job names" in text
    assert "of these alone (* is any characters): final_conv.*, upcat_1.*" in text
    assert "network: none is named, so no such job can train here" in text
    limit(kit, "# bundle:", f"bundle: {tmp_path}/unet.yaml")
    assert f"network: {tmp_path}/unet.yaml" in "\n".join(lines(read_kit(kit)))
    assert statement(read_kit(kit))["leaves"]["own_network"] == {
        "file": f"{tmp_path}/unet.yaml",
        "parameters": ["final_conv.*", "upcat_1.*"],
    }
