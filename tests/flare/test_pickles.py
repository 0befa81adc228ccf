"""A pickle that runs code when it is opened, wherever this package reads a file or a message."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import nibabel
import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from watched import watched

import flap_nvflare.flare
from flap_nvflare.adapter.container import CodecError
from flap_nvflare.adapter.links import arrived
from flap_nvflare.adapter.update import UpdateError, load_update
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.kits import Case
from flap_nvflare.data.prepared import _unpack, read_window
from flap_nvflare.data.store import Store
from flap_nvflare.data.volume import load_volume
from flap_nvflare.flare.run import RunFolder
from flap_nvflare.sam.backbone import ARCHITECTURES
from flap_nvflare.sam.checkpoint import CheckpointError, read_checkpoint
from flap_nvflare.training.errors import StateError
from flap_nvflare.training.site_memory import MOMENTS, SiteMemory
from flap_nvflare.training.tensor_files import read_tensors

assert flap_nvflare.flare  # registers what reads tensors in messages


class Bomb:
    """Makes the file `canary` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def _torch(legacy: bool) -> bytes:
    stream = io.BytesIO()
    bomb = {"image_encoder.pos_embed": torch.ones(2), "bomb": Bomb()}
    torch.save(bomb, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def _numpy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    return stream.getvalue()


def _numpy_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("t.npy", _numpy())
    return stream.getvalue()


BOMBS = {
    "pickle": pickle.dumps(Bomb()),
    "old pickle": pickle.dumps(Bomb(), protocol=0),
    "torch": _torch(legacy=False),
    "old torch": _torch(legacy=True),
    "npy": _numpy(),
    "npz": _numpy_zip(),
    "gzip": gzip.compress(pickle.dumps(Bomb())),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(read: Callable[[], Any], error: type[Exception] | tuple[Any, ...], match: str) -> None:
    with watched() as seen, pytest.raises(error, match=match):
        read()
    assert not seen.run
    assert not Path("canary").exists()


def harmless(read: Callable[[], Any]) -> Any:
    """What the reader returns, None if it raises; nothing may run in either case."""
    found = None
    with watched() as seen, contextlib.suppress(Exception):
        found = read()
    assert not seen.run
    assert not Path("canary").exists()
    return found


def test_the_bomb_works() -> None:
    with watched() as seen:
        pickle.loads(BOMBS["pickle"])
    assert Path("canary").exists()
    assert seen.run


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("kind", BOMBS)
def test_as_a_checkpoint(kind: str, suffix: str, place: Path) -> None:
    path = place / f"sam{suffix}"
    path.write_bytes(BOMBS[kind])
    refused(lambda: read_checkpoint(path, ARCHITECTURES["vit_t"]), CheckpointError, "readable file")


@pytest.mark.parametrize("kind", BOMBS)
def test_as_an_adapter_or_state(kind: str, place: Path) -> None:
    memory, run = SiteMemory(place), RunFolder(place)
    for name in ("update", "server_1", "moments_0"):
        (place / f"{name}.safetensors").write_bytes(BOMBS[kind])
    refused(lambda: load_update(place / "update.safetensors"), UpdateError, "no whole safetensors")
    refused(lambda: run.load_state(1), UpdateError, "cannot be read")
    refused(lambda: memory.read(MOMENTS, 0, {}), StateError, "cannot be read")
    refused(lambda: read_tensors(place / "update.safetensors", "any"), StateError, "cannot be read")


@pytest.mark.parametrize("kind", BOMBS)
def test_as_a_prepared_case_or_window(kind: str, place: Path) -> None:
    store = Store(place / "cache", 10**6)
    store.write("window.json", BOMBS[kind])
    assert harmless(lambda: _unpack(BOMBS[kind])) is None
    assert harmless(lambda: read_window(store, "window")) is None


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".npy", ".mgz", ".img", ".hdr"])
def test_as_a_scan(kind: str, suffix: str, place: Path) -> None:
    path = place / f"imaging{suffix}"
    path.write_bytes(BOMBS[kind] + bytes(400))
    refused(lambda: load_volume(Case("case", path, path), 2), DataError, str(path.name))


def test_as_an_extension_of_a_nifti_header(place: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    label = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    for code in (0, 4, 6, 40, 44):  # 44 holds what MATLAB pickles
        extension = nibabel.nifti1.Nifti1Extension(code, BOMBS["old pickle"])
        image.header.extensions[:] = [extension]
        nibabel.save(image, place / "imaging.nii.gz")
        nibabel.save(label, place / "segmentation.nii.gz")
        case = Case("case", place / "imaging.nii.gz", place / "segmentation.nii.gz")
        with watched() as seen:
            assert load_volume(case, 2).image.shape == (2, 2, 2)
        assert not seen.run
        assert not Path("canary").exists()


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("stages", [(), ("difference", "int4", "deflate")])
def test_as_coded_bytes(kind: str, stages: tuple[str, ...]) -> None:
    held = {"mask_decoder.mask_tokens.weight": torch.ones(2)}
    refused(lambda: arrived(BOMBS[kind], stages, "up", held, held), CodecError, "message")


TENSOR = "nvflare.app_opt.pt.decomposers.TensorDecomposer"
DATA_CLASS = "nvflare.fuel.utils.fobs.decomposer.DataClassDecomposer"


def message(type_name: str, data: Any, decomposer: str) -> bytes:
    """What a peer could write in the place of a message of FLARE's."""
    body = msgpack.packb(
        {"__fobs_type__": type_name, "__fobs_data__": data, "__fobs_dc__": decomposer}
    )
    header: bytes = fobs.dumps(1)[:2] + len(body).to_bytes(8, "big")
    return header + body


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize(
    ("type_name", "decomposer"),
    [("torch.Tensor", TENSOR), ("numpy.ndarray", "nvflare.app_common.decomposers.numpy_decomposers."
     "NumpyArrayDecomposer")],
)  # fmt: skip
def test_as_a_tensor_in_a_message(kind: str, type_name: str, decomposer: str) -> None:
    data = {"type": "native", "data": BOMBS[kind]}
    # numpy opens a zip file only when its arrays are asked for; a gate sees that it is no tensor.
    found = harmless(lambda: fobs.loads(message(type_name, data, decomposer)))
    assert not isinstance(found, torch.Tensor | np.ndarray)


@pytest.mark.parametrize(
    ("type_name", "decomposer"),
    [
        ("subprocess.Popen", DATA_CLASS),
        ("os.system", DATA_CLASS),
        ("builtins.eval", DATA_CLASS),
        ("pathlib.PosixPath", DATA_CLASS),
        ("test_pickles.Bomb", DATA_CLASS),
        ("test_pickles.Bomb", "test_pickles.Bomb"),
        ("builtins.dict", "subprocess.Popen"),
        ("nvflare.apis.dxo.DXO", "os.system"),
        ("logging.config.DictConfigurator", DATA_CLASS),
        ("flap_nvflare.flare.executor.FlapExecutor", DATA_CLASS),
        ("torch.nn.Module", "nvflare.fuel.utils.fobs.decomposer.EnumTypeDecomposer"),
    ],
)
def test_a_message_can_name_no_class_of_its_own(type_name: str, decomposer: str) -> None:
    for data in ({"args": "touch canary"}, ["touch canary"], "touch canary", None):
        sent = message(type_name, data, decomposer)
        if type_name == "nvflare.apis.dxo.DXO":  # known already: what else it names is not read
            harmless(lambda sent=sent: fobs.loads(sent))
        else:
            refused(lambda sent=sent: fobs.loads(sent), Exception, "not allowed|must be registered")


def test_an_object_of_a_class_that_is_not_registered_does_not_arrive() -> None:
    class Own:
        def __init__(self) -> None:
            self.command = "touch canary"

        def __setstate__(self, state: Any) -> None:
            os.system("touch canary")

    sent = fobs.dumps(DXO(DataKind.WEIGHTS, {"a": Own()}).to_shareable())
    fobs.reset()  # as in the process of the receiver, which has never met the class
    fobs.register(TensorDecomposer)
    refused(lambda: fobs.loads(sent), Exception, "not allowed|must be registered")
