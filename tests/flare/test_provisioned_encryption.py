"""A provisioned federation on loopback with FLARE's HEBuilder, under the sites' own policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from encryption_cases import SMALL
from provisioned import SERVER, Provisioned
from safetensors import safe_open

from flap_nvflare.adapter.cipher import SEALED, Cipher
from flap_nvflare.adapter.update import UpdateSpec, load_update
from flap_nvflare.data.phantom import write_phantom
from flap_nvflare.site.audit_summary import summary

KEYS = {
    "path": "nvflare.lighter.impl.he.HEBuilder",
    "args": {"poly_modulus_degree": 8192, "coeff_mod_bit_sizes": [60, 60], "scale_bits": 45},
}


@pytest.fixture
def hospitals(tmp_path: Path) -> Iterator[Provisioned]:
    """Running server and sites A and B, which take part in encrypted rounds only."""
    federation = Provisioned(
        tmp_path,
        sites=("A", "B"),
        settings={**SMALL, "encryption": "he"},
        site_file={"own_process": "off"},
        data_root=write_phantom(tmp_path / "scans", seed=0, sites=["A", "B"]),
        builders=(KEYS,),
    )
    federation.provision()
    try:
        federation.start()
        yield federation
    finally:
        federation.stop()


@pytest.mark.provisioned
def test_a_server_without_the_key_runs_the_job_and_never_has_an_adapter(
    hospitals: Provisioned,
) -> None:
    session = hospitals.session()
    try:
        status = hospitals.wait(session, hospitals.submit(session), seconds=280)
    finally:
        session.close()
    assert status == "FINISHED:COMPLETED", hospitals.logs()
    (run,) = hospitals.runs()
    assert (run / "cross_site.json").is_file(), hospitals.logs()

    # Nothing in the server's folders opens what it has.
    assert not (hospitals.kits / SERVER / "startup" / "client_context.tenseal").exists()
    context = (hospitals.kits / SERVER / "startup" / "server_context.tenseal").read_bytes()
    assert not Cipher(context).opens
    site = Cipher((hospitals.kits / "A" / "startup" / "client_context.tenseal").read_bytes())
    (own,) = (hospitals.kits / "A" / "flap").rglob("adapter.safetensors")
    plain: UpdateSpec = load_update(own)[1]
    files = sorted(run.rglob("*.safetensors"))
    assert [path.name for path in files] == [
        "adapter_best.safetensors",
        "adapter_last.safetensors",
        "server_2.safetensors",
    ]
    with safe_open(str(files[-1]), framework="pt") as state:
        assert not list(state.keys())  # a linear rule remembers nothing
    for path in files[:-1]:
        sealed, spec, _ = load_update(path)
        assert set(sealed) == SEALED
        assert spec == site.spec(plain)
        opened = site.open(sealed, plain)
        assert sum(float(tensor.square().sum()) for tensor in opened.values()) ** 0.5 < 1e4
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [set(line["sites"]) for line in rounds] == [{"A", "B"}] * 2
    audit = summary(hospitals.kits / "A")
    assert audit.intact
    (job,) = audit.jobs
    assert (job.sent, job.blocked) == (3, 0)  # two rounds and the scores
