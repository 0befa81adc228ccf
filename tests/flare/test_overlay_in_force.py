"""The overlay over real kits, judged by FLARE itself: who may do what, which components are built,
and a federation that runs under it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvflare.apis.fl_constant import AdminCommandNames
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.workspace import Workspace
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.private.fed.app.fl_conf import create_privacy_manager
from nvflare.security.security import COMMAND_CATEGORIES, FLAuthorizer
from processes import stop
from real_kits import SERVER, provision, start, with_session
from shown import in_lines, in_tensorboard

from flap_nvflare.data.phantom import write_phantom
from flap_nvflare.flare.coding import PrivacyFilter
from flap_nvflare.flare.encryption import DecryptAdapter
from flap_nvflare.flare.site_gate import SiteGate
from flap_nvflare.site.kit import read_kit
from flap_nvflare.site.merge import RIGHTS
from flap_nvflare.site.overlay import lay, overlay_folder
from flap_nvflare.site.policy import read_policy

JOB = Path(__file__).parents[2] / "jobs" / "fed_kits"
ROLES = ("project_admin", "org_admin", "lead", "member")


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kits = provision(tmp_path_factory.mktemp("kits"), ("A", "B"))
    shutil.copytree(kits, kits.parent / "bare")
    for name in (SERVER, "A", "B"):
        lay(read_kit(kits / name))
    return kits


def granted(kit: Path, file: str) -> dict[tuple[str, str, str], bool]:
    """Whether a person of a role and an organisation has a right, by FLARE's own judgement."""
    authorizer = FLAuthorizer("o", json.loads((kit / "local" / file).read_text()))
    found = {}
    for role in ROLES:
        for org in ("o", "other"):
            person = Person("somebody", org, role)
            for right in (*RIGHTS, *COMMAND_CATEGORIES, "byoc", "server-predeployed-flwr"):
                context = AuthzContext(right, person, person)
                found[role, org, right] = authorizer.authorize(context)[0]
    return found


@pytest.mark.parametrize("name", ["A", SERVER])
def test_no_role_brings_code_and_every_other_right_is_as_before(kits: Path, name: str) -> None:
    before = granted(kits.parent / "bare" / name, "authorization.json.default")
    after = granted(kits / name, "authorization.json")
    assert {right for (_, _, right) in after if right in ("byoc", "server-predeployed-flwr")}
    shell = {right for right, kind in COMMAND_CATEGORIES.items() if kind == "shell_commands"}
    changed = {key for key in before if before[key] != after[key]}
    assert {(role, org) for role, org, right in changed if right in {*shell, "shell_commands"}} == {
        ("project_admin", "other")
    }
    assert {right for *_, right in changed} <= {
        "byoc", "server-predeployed-flwr", "shell_commands", *shell,
    }  # fmt: skip
    assert before["project_admin", "other", "byoc"]
    assert not any(held for (_, _, right), held in after.items() if right == "byoc")


def test_a_whole_grant_is_spelt_out_with_every_right_that_flare_knows() -> None:
    names = {getattr(AdminCommandNames, name) for name in dir(AdminCommandNames) if name.isupper()}
    # Messages between server and sites, which no person sends.
    internal = {"abort_task", "admin_check_status", "aux_command", "check_resources", "deploy_app"}
    left = names - set(COMMAND_CATEGORIES) - internal - {"report_version"}
    assert left <= set(RIGHTS)
    assert set(COMMAND_CATEGORIES.values()) <= set(RIGHTS)


def components(values: Any) -> Iterator[str]:
    """All component paths in a job's or site's configuration."""
    if isinstance(values, dict):
        if isinstance(values.get("path"), str):
            yield values["path"]
        for value in values.values():
            yield from components(value)
    elif isinstance(values, list):
        for value in values:
            yield from components(value)


def judge(kit: Path, path: str, name: str) -> None:
    authorizer = ComponentPathAuthorizer()
    authorizer.authorize_component_config({"path": path}, workspace=Workspace(str(kit), name))


def test_the_jobs_components_are_allowed_and_no_function_is(kits: Path) -> None:
    for side, name in (("client", "A"), ("server", SERVER)):
        config = json.loads((JOB / "app" / "config" / f"config_fed_{side}.json").read_text())
        paths = list(components(config))
        assert paths
        for path in paths:
            judge(kits / name, path, name)
        # Any of these would do as it is told, without a line of code in the job.
        for path in (
            "flap_nvflare.flare.processes.spawn_process",
            "flap_nvflare.cli.main",
            "flap_nvflare.data.source.list_source",
            "site_data.site_cases",
            "flap_nvflare.flare.executor.FlapExecutorOther",
        ):
            with pytest.raises(UnsafeComponentError):
                judge(kits / name, path, name)


def test_flare_reads_the_policy_and_builds_its_filters(kits: Path) -> None:
    manager = create_privacy_manager(Workspace(str(kits / "A"), "A"), names_only=False)
    scope = manager.default_scope
    assert manager.get_scope("") is scope
    assert manager.get_scope("open") is None  # FLARE refuses a job that asks for another scope
    assert [type(one) for one in scope.task_data_filters["in"]] == [DecryptAdapter, SiteGate]
    assert [type(one) for one in scope.task_result_filters["out"]] == [PrivacyFilter, SiteGate]
    assert scope.task_data_filters["in"][1].offset
    assert not scope.task_result_filters["out"][1].offset
    assert read_policy(read_kit(kits / "A")).gate


def test_every_part_of_the_overlay_is_in_this_package() -> None:
    from importlib import import_module

    files = sorted(overlay_folder().glob("*/*.json"))
    assert len(files) == 3
    for file in files:
        values = json.loads(file.read_text(encoding="utf-8"))
        for path in {*components(values), *values.get("class_allow_list", [])}:
            module, _, name = path.rpartition(".")
            assert isinstance(getattr(import_module(module), name), type), path


@pytest.mark.provisioned
def test_a_federation_runs_under_it(tmp_path: Path) -> None:
    """Two sites, one of which asks for more cases than it has: the other goes on alone."""
    kits = provision(tmp_path, ("A", "B"))
    data = write_phantom(tmp_path / "scans", seed=0, sites=["A", "B"])
    job = tmp_path / "fed_kits"
    shutil.copytree(JOB, job, ignore=shutil.ignore_patterns("custom"))
    settings = job / "app" / "config" / "federation.yaml"
    values = yaml.safe_load(settings.read_text(encoding="utf-8"))
    small = {"image_size": 32, "rank": 2, "rounds": 2, "local_epochs": 1, "min_sites": 1}
    small |= {"straggler_wait": 60, "tracking": "tensorboard"}
    settings.write_text(yaml.safe_dump({**values, **small}))
    meta = json.loads((job / "meta.json").read_text(encoding="utf-8"))
    meta["deploy_map"] = {"app": ["server", "A", "B"]}
    (job / "meta.json").write_text(json.dumps(meta))
    running = []
    try:
        for name in (SERVER, "A", "B"):
            given = {} if name == SERVER else {"data_root": str(data), "device": "cpu"}
            lay(read_kit(kits / name), given)
            if name == "B":
                own = kits / "B" / "local" / "flap_site.yaml"
                own.write_text(own.read_text().replace("min_cases: 1", "min_cases: 99"))
            running.append(start(kits / name, tmp_path / f"home_{name}"))

        def run(session: Any) -> str:
            identity = session.submit_job(str(job))
            session.monitor_job(identity, timeout=200)
            return str(identity)

        identity = with_session(kits, 2, 240, run)
    finally:
        for process in running:
            stop(process)
    runs = sorted((tmp_path / f"home_{SERVER}" / "flap" / "runs" / "fed_kits").glob("*"))
    assert runs, (tmp_path / f"home_{SERVER}" / "output.txt").read_text()[-3000:]
    lines = [json.loads(line) for line in (runs[0] / "rounds.jsonl").read_text().splitlines()]
    assert [sorted(line["sites"]) for line in lines] == [["A"], ["A"]]
    assert in_tensorboard(runs[0]) == in_lines(lines)
    # Jobs and state lie in the kits, and nowhere else.
    assert list((kits / SERVER / "flap" / "jobs").rglob(f"*{identity}*"))
    assert list((kits / "A" / "flap" / "state").rglob("*.safetensors"))
    assert not (tmp_path / "home_A" / "flap").exists()
    text = (tmp_path / "home_B" / "output.txt").read_text()
    assert "limits.min_cases is 99" in text
