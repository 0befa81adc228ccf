"""The base weights: the packaged file, a cut one, another one, a pinned one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flap_nvflare.sam.checkpoint import PACKAGED, file_sha256
from flap_nvflare.site.doctor_weights import check_bundle, check_weights
from flap_nvflare.site.finding import guarded


def test_the_packaged_weights() -> None:
    loaded, digest = check_weights("", "")
    assert loaded.ok is True
    assert ": vit_t, 3.25 MB, the packaged one" in loaded.found
    assert digest.ok is None
    assert f"checkpoint_sha256: {file_sha256(PACKAGED)}" in digest.found


def test_a_pinned_file() -> None:
    own = file_sha256(PACKAGED)
    assert [f.ok for f in check_weights(str(PACKAGED), own.upper())] == [True, True]
    _, digest = check_weights(str(PACKAGED), "0" * 64)
    assert digest.ok is False
    assert own in digest.found


def test_weights_of_another_model_than_the_federations() -> None:
    loaded, _ = check_weights("", "", "vit_b")
    assert loaded.ok is False
    assert "asks for vit_b" in loaded.found


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_file_cut_short(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"sam{ending}"
    if ending == ".pth":
        torch.save({"image_encoder.x": torch.zeros(5000)}, path)
    else:
        path.write_bytes(PACKAGED.read_bytes())
    path.write_bytes(path.read_bytes()[:-4096])
    (finding,) = guarded("base weights", lambda: check_weights(str(path), ""))
    assert finding.ok is False
    assert "cut short" in finding.found
    assert "download" in finding.mend


def test_a_file_that_is_not_there_or_holds_no_sam(tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    (finding,) = guarded("base weights", lambda: check_weights(str(path), ""))
    assert "there is no such file" in finding.found
    torch.save({"layer.weight": torch.zeros(2)}, path)
    (finding,) = guarded("base weights", lambda: check_weights(str(path), ""))
    assert finding.ok is False
    assert "no SAM encoder" in finding.found


def test_a_network_of_the_sites_own(tmp_path: Path) -> None:
    file = tmp_path / "unet.yaml"
    for named in ("", str(file)):
        (missing,) = check_bundle(named)
        assert missing.ok is False
        assert "as bundle in flap_site.yaml" in missing.mend
    file.touch()
    (there,) = check_bundle(str(file))
    assert there.ok is True
