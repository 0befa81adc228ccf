"""Real federations of two sites with the last gate, read at the wire: honest, hostile, failing.

One federation stays up for all of it; its sites' scans, folders, files and NIfTI headers have a
word in them that must never be found outside.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from canary import CANARY, break_scan, canary_scans
from capture import read
from gated import DP_SEED, SITES, SMALL, Gated, component
from hostile import SECRET

from flap_nvflare.flare.asked import shapes_up
from flap_nvflare.settings import Federation
from flap_nvflare.site.audit_log import read_lines
from flap_nvflare.site.audit_summary import AuditSummary, summary

GATE = "flap_nvflare.flare.last_gate.LastGate"
HOSTILE = {"rounds": 1, "cross_site": "global", "image_size": 32}

pytestmark = [pytest.mark.provisioned, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gated]:
    folder = tmp_path_factory.mktemp("gated")
    own = os.environ.get("HOME")
    data = canary_scans(folder / f"scans_{CANARY}", SITES)
    wire = component("capture.WireCapture", folder=str(folder / "wire"))
    found = Gated(folder, data, [wire, component(GATE)])
    resources = json.loads((found.kits / "A" / "local" / "resources.json").read_text())
    for site in SITES:
        allowed = [*resources["class_allow_list"], "hostile."]
        found.change_resources(site, class_allow_list=allowed)
    # Site A has turned the upload of its error log off, site B has FLARE's default.
    found.change_resources("A", allow_log_streaming=False)
    found.start()
    yield found
    found.stop()
    if own is not None:
        os.environ["HOME"] = own


def server_files(federation: Gated) -> dict[str, bytes]:
    """All that the server has: its kit, its jobs, its runs, its log."""
    folder = federation.folder
    places = [federation.kits / "localhost", folder / "flap_localhost", folder / "store"]
    paths = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (*paths, folder / "localhost.txt")
    }


def told(federation: Gated, site: str, job: str) -> list[dict[str, Any]]:
    path = federation.kits / site / "flap" / "audit.jsonl"
    found = [values for _, values in read_lines(path)]
    return [values for values in found if values is not None and values["job"] == job]


def nowhere(word: str, federation: Gated) -> None:
    """The word is in no file of the server, no error log of a site, and was never sent."""
    for name, content in server_files(federation).items():
        assert word.encode() not in content, name
    for site in SITES:
        for path in (federation.kits / site).rglob("error_log.txt*"):
            assert word not in path.read_text(errors="replace"), path
    for line in read(federation.folder / "wire"):
        assert word not in json.dumps(line), (line["channel"], line["topic"])


def test_an_honest_run_sends_the_adapters_tensors_and_nothing_else(federation: Gated) -> None:
    job = federation.run(federation.job("fed_kits", {**SMALL, "dp_clip": 0.5, "dp_noise": 0.1}))
    assert len(federation.rounds()) == 2, federation.logs()
    allowed = set(shapes_up(Federation(**SMALL), 8))
    lines = read(federation.folder / "wire")
    results = [line for line in lines if line["topic"] == "submit_update"]
    assert len(results) == 2 * 3  # two rounds and the scores
    sent = [set(line["tensors"]) for line in results]
    assert sorted(map(len, sent)) == [0, 0, *[len(allowed)] * 4]
    assert all(names <= allowed for names in sent)
    # What the server fetches are these tensors' values, each as a file of one tensor that has up to
    # 100 bytes more; two sites, two rounds.
    fetched = sum(size for line in lines for size in line["bytes_parts"])
    numbers = sum(math.prod(shape) for shape in shapes_up(Federation(**SMALL), 8).values())
    assert 4 * 4 * numbers < fetched <= 4 * (4 * numbers + 100 * len(allowed))
    ways = {(line["channel"], line["topic"]) for line in lines if not line["error"]}
    assert ways <= {
        ("admin", "train.notify_job_status"),
        ("aux_communication", "__job_heartbeat__"),
        ("aux_communication", "__sync_runner__"),
        ("aux_communication", "__task_check__"),
        ("cellnet.channel", "bye"),
        ("download_service__", "download_service__download"),
        ("return_only", "aux_communication:__end_run__"),
        ("return_only", "download_service__:download_service__download"),
        ("server_command", "get_task"),
        ("server_command", "submit_update"),
        ("sm__STREAM", "sm__ACK"),
        ("sm__STREAM", "sm__DATA"),
    }
    for site in SITES:
        records = told(federation, site, job)
        weights = [one for one in records if one["tensors"]]
        assert [one["outcome"] for one in weights] == ["sent"] * 2
        assert {tensor["name"] for tensor in weights[0]["tensors"]} == allowed
        found: AuditSummary = summary(federation.kits / site, job)
        assert found.intact
        assert (found.jobs[0].sent, found.jobs[0].received) == (3, 3)
        assert len(weights[0]["filters"]) == 4
    nowhere(CANARY, federation)
    no_secret(federation)


def no_secret(federation: Gated) -> None:
    """No log, of the sites neither, has a line of a private key or the seed of the noise."""
    words = {DP_SEED}
    for key in federation.kits.rglob("*.key"):
        words.add(key.read_text().splitlines()[1])
    assert len(words) > len(SITES)
    paths = [*federation.kits.rglob("*log*"), *federation.folder.glob("*.txt")]
    for path in paths:
        text = path.read_text(errors="replace") if path.is_file() else ""
        assert not [word for word in words if word in text], path


def test_what_a_jobs_filters_and_components_add_is_stopped(federation: Gated) -> None:
    job = federation.run(
        federation.job("hostile", HOSTILE, ["hostile.AddTensor"], ["hostile.Whisper"])
    )
    replied = 0
    for site in SITES:
        records = told(federation, site, job)
        reasons = {one["task"]: one["reason"] for one in records if one["outcome"] == "blocked"}
        assert SECRET in reasons.get("train", SECRET)
        assert "aux_communication/fed.event" in reasons
        assert "aux_communication/note" in reasons
        left = [one for one in records if one["outcome"] == "sent"]
        assert all(one["return_code"] == "TASK_RESULT_FILTER_ERROR" for one in left)
        assert not any(one["tensors"] for one in left)
        replied += len(left)
    assert replied  # the job may end with the first
    nowhere(SECRET, federation)


def test_a_job_for_the_whole_network_gets_nothing(federation: Gated) -> None:
    settings = {**HOSTILE, "method": "full", "rule": "mean"}
    job = federation.run(federation.job("whole", settings))
    replied = 0
    for site in SITES:
        records = told(federation, site, job)
        left = [one for one in records if one["direction"] == "out" and one["outcome"] == "sent"]
        assert all(one["return_code"] != "OK" and not one["tensors"] for one in left)
        replied += len(left)
    assert replied


@pytest.mark.parametrize(
    "how", [{"A": "no mask", "B": "corrupt"}, {"A": "not finite", "B": "no folder"}, {"B": "disk"}]
)
def test_no_failure_tells_a_case(federation: Gated, how: dict[str, str]) -> None:
    data = federation.data
    shutil.rmtree(data)
    canary_scans(data, SITES)
    for site, fault in how.items():
        if fault != "disk":
            break_scan(data, 4 * SITES.index(site), fault)
    state = federation.kits / "B" / "flap" / "state"
    if how["B"] == "disk":
        shutil.rmtree(state)
        state.write_text("a file in the folder's place")
    job = federation.run(federation.job("_".join(how.values()).replace(" ", ""), HOSTILE))
    failed = [one for site in how for one in told(federation, site, job)]
    codes = {one["return_code"] for one in failed if one["direction"] == "out"}
    assert codes
    assert "OK" not in codes
    # It did fail on what has the canary in its name, or beside it.
    log = "".join(
        path.read_text(errors="replace")
        for site in SITES
        for path in (federation.kits / site / job).rglob("log.txt")
    )
    assert "failed" in log
    assert how["B"] == "disk" or CANARY in log
    nowhere(CANARY, federation)
    # Site A uploads no error log, site B does: its file comes to the server, and is bare.
    end = time.monotonic() + 30
    while "ERRORLOG_B" not in (names := uploaded(federation, job)):
        assert time.monotonic() < end, names
        time.sleep(0.5)
    assert "ERRORLOG_A" not in names
    nowhere(CANARY, federation)


def uploaded(federation: Gated, job: str) -> set[str]:
    """Names of the files that the server has of the job."""
    return {path.name for path in (federation.folder / "store").rglob("*") if job in str(path)}
