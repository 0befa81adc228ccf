"""A server that means harm: what it asks is refused at the site, and nothing of it runs."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import SiteContext
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.utils import fobs
from scan_files import write_sites
from watched import watched

from flap_nvflare.adapter.links import Downlink
from flap_nvflare.adapter.update import UpdateSpec, content_sha256
from flap_nvflare.flare import messages
from flap_nvflare.flare.coding import DecodeAdapter
from flap_nvflare.flare.encryption import DecryptAdapter
from flap_nvflare.flare.executor import FlapExecutor
from flap_nvflare.flare.filters import AdapterOnlyFilter
from flap_nvflare.sam.segmenter import build_segmenter
from flap_nvflare.sam.tuning import trainable
from flap_nvflare.settings import CHOICES, RANGES, Federation
from flap_nvflare.training.work import SiteWork

SETTINGS: dict[str, Any] = {
    "base": "random", "image_size": 32, "rank": 2, "rounds": 2, "batch_size": 2,
    "local_epochs": 1, "augment": False,
}  # fmt: skip
DOWNLOAD = ("difference", "int4", "deflate")
RUN = "fed_kits/20260101-000000"
HEAD = "mask_decoder.mask_tokens.weight"
FROZEN = "image_encoder.blocks.0.attn.qkv.weight"
NETWORK = build_segmenter("vit_t", 32, 2, "flap", 2, seed=0, base="random")
FIRST = {name: p.detach().clone() for name, p in trainable(NETWORK, "flap").items()}
SPEC = UpdateSpec.of(FIRST, "flap", 2, NETWORK.base_sha256)
FIXED = content_sha256({})
LORA_A = next(name for name in FIRST if name.endswith(".lora_a"))
LORA_B = LORA_A.replace("lora_a", "lora_b")
STEM = LORA_A.removesuffix(".lora_a")


@dataclasses.dataclass
class Task:
    """A task for a site, right until it is spoilt."""

    data: dict[Any, Any] = dataclasses.field(
        default_factory=lambda: {name: tensor.clone() for name, tensor in FIRST.items()}
    )
    spec: Any = dataclasses.field(default_factory=SPEC.to_dict)
    round: Any = 0
    settings: Any = dataclasses.field(default_factory=lambda: dict(SETTINGS))
    run: Any = RUN
    fixed: Any = FIXED
    kind: Any = DataKind.WEIGHTS
    name: str = messages.TRAIN
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)

    def message(self) -> Shareable:
        dxo = DXO(
            self.kind, self.data, {messages.SPEC: self.spec, messages.ROUND: self.round}
        ).to_shareable()
        settings = self.settings
        if type(settings) is dict and settings.keys() & SETTINGS.keys():
            settings = {**Federation(**SETTINGS).to_dict(), **settings}
        dxo.set_header(messages.FEDERATION, settings)
        dxo.set_header(messages.RUN, self.run)
        dxo.set_header(messages.TURNED, False)
        dxo.set_header(messages.FIXED, self.fixed)
        dxo.update(self.beside)
        found: Shareable = fobs.loads(fobs.dumps(dxo))
        return found


class Hospital:
    """Site A: its filters and executor as FLARE's client calls them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "home" / "state"
        self.state.mkdir(parents=True)
        self.context = SiteContext(folder)
        self.executor = FlapExecutor()
        self.trained = 0
        write_sites(folder / "scans", ("A",))
        (self.context.local / "flap_site.yaml").write_text(
            f"data_root: {folder / 'scans'}\nown_process: off\n"
        )

    def does(self, task: Task) -> Shareable:
        message = task.message()
        filters = (DecryptAdapter(), AdapterOnlyFilter("flap", offset=True), DecodeAdapter())
        try:
            for one in filters:
                message = one.process(message, self.context)
        except Exception:
            return make_reply(ReturnCode.TASK_DATA_FILTER_ERROR)
        return self.executor.execute(task.name, message, self.context, Signal())

    def refuses(self, task: Task) -> None:
        before = self.trained
        with watched() as seen:
            reply = self.does(task)
        assert reply.get_return_code() != ReturnCode.OK
        assert "DXO" not in reply
        assert self.trained == before
        assert not seen.run
        assert not seen.outside(self.state)
        assert not (self.folder / "canary").exists()


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("hospital")
        patch.setenv("FLAP_HOME", str(folder / "home"))
        patch.chdir(folder)
        for name in ("FLAP_DATA_ROOT", "FLAP_SAM_CHECKPOINT"):
            patch.delenv(name, raising=False)
        found = Hospital(folder)
        train = SiteWork.train

        def counted(work: SiteWork, *args: Any, **more: Any) -> Any:
            found.trained += 1
            return train(work, *args, **more)

        patch.setattr(SiteWork, "train", counted)
        yield found


EXPRESSIONS: tuple[Any, ...] = (
    "$import os; os.system('touch canary')",
    "$__import__('os').system('touch canary')",
    "@net",
    "%bundle/train.yaml",
    {"_target_": "os.system", "command": "touch canary"},
    {"_target_": "builtins.exec", "_mode_": "debug"},
    ["$open('canary', 'w')"],
)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Federation)])
def test_no_setting_can_be_an_expression(hospital: Hospital, name: str) -> None:
    for value in EXPRESSIONS:
        hospital.refuses(Task(settings={**SETTINGS, name: value}))


def test_no_setting_is_taken_out_of_its_range(hospital: Hospital) -> None:
    for name, (low, high) in RANGES.items():
        for value in (low - 1, high + 1, high * 1e9, math.nan, math.inf, -math.inf, None, True):
            hospital.refuses(Task(settings={**SETTINGS, name: value}))
    for name in CHOICES:
        for value in ("", "other", 0, None, ["none"]):
            hospital.refuses(Task(settings={**SETTINGS, name: value}))


SETTINGS_AS_A_WHOLE: tuple[Any, ...] = (
    {},
    None,
    [],
    "federation.yaml",
    {**SETTINGS, "bundle": {"network": {"_target_": "os.system"}}},
    {**SETTINGS, "imports": ["$import os"]},
    {**SETTINGS, "data_root": "/etc"},
    {**SETTINGS, "checkpoint": "/etc/passwd"},
    {**SETTINGS, "$import os": 1},
    {**SETTINGS, "_target_": "os.system"},
    {**SETTINGS, "site_ranks": {"$import os": 1}},
    {**SETTINGS, "site_ranks": {"../A": 1}},
    {**SETTINGS, "class_names": ["kidney", "$import os"]},
    {**SETTINGS, "class_names": ["kidney", "../tumour"]},
    {**SETTINGS, "class_names": ["kidney", "tum\nour"]},
    {**SETTINGS, "class_names": ["kidney", "t" * 10_000]},
    {**SETTINGS, "class_names": ["kidney"] * 100_000},
    {**SETTINGS, "class_names": ["kidney", "kidney"]},
    {**SETTINGS, "rule": "os"},
    {**SETTINGS, "rule": "core"},
    {**SETTINGS, "upload": ["zip"]},
    {**SETTINGS, "upload": [1]},
    {**SETTINGS, "download": ["top_k=0"]},
    {**SETTINGS, "rule": "ffa", "method": "decoder"},
)


@pytest.mark.parametrize("settings", SETTINGS_AS_A_WHOLE, ids=range(len(SETTINGS_AS_A_WHOLE)))
def test_unknown_and_senseless_settings_are_refused(hospital: Hospital, settings: Any) -> None:
    hospital.refuses(Task(settings=settings))


@pytest.mark.parametrize(
    "run",
    [
        "../20260101", "..", "a/..", "/etc/cron.d", "a/b/c", "a//b", "a", "", "a/", "/a", "a/b\n",
        "a/b\0", "a/~", "~/a", "a/$HOME", "file://a/b", "C:\\a/b", "a/%2e%2e", "a/\u2024\u2024",
        "a/" + "b" * 5000, None, 5, ["a/b"], {"a": "b"}, "a/b c", "a/.b", "a/..%00",
        "\uff0e\uff0e/a",
    ],
)  # fmt: skip
def test_a_name_of_a_run_leads_nowhere_else(hospital: Hospital, run: Any) -> None:
    hospital.refuses(Task(run=run))


def changed(**values: Any) -> Callable[[Task], object]:
    return lambda task: task.data.update(values)


def spec(**values: Any) -> Callable[[Task], object]:
    return lambda task: task.spec.update(values)


def offset(size: float, rank: int = 1, **settings: Any) -> Callable[[Task], None]:
    def spoil(task: Task) -> None:
        rows, columns = FIRST[LORA_B].shape[0], FIRST[LORA_A].shape[1]
        task.settings |= {"rule": "residual", **settings}
        task.data[f"{STEM}.offset_a"] = torch.full((rank, columns), size)
        task.data[f"{STEM}.offset_b"] = torch.full((rows, rank), size)[:rows]

    return spoil


def of_rank(rank: int) -> Callable[[Task], None]:
    def spoil(task: Task) -> None:
        network = build_segmenter("vit_t", 32, 2, "flap", rank, seed=0, base="random")
        task.data = {n: p.detach().clone() for n, p in trainable(network, "flap").items()}
        task.spec = UpdateSpec.of(task.data, "flap", rank, NETWORK.base_sha256).to_dict()

    return spoil


def at(name: str, value: float) -> Callable[[Task], object]:
    return lambda task: task.data[name].view(-1)[:1].fill_(value)


HOSTILE: dict[str, Callable[[Task], object]] = {
    "a frozen key": changed(**{FROZEN: torch.zeros(2, 2)}),
    "a buffer of the network": changed(pixel_mean=torch.zeros(3, 1, 1)),
    "an expression as a name": changed(**{"$import os": torch.zeros(2)}),
    "a path as a name": changed(**{f"../{HEAD}": torch.zeros(2)}),
    "no tensor": changed(**{HEAD: "$import os"}),
    "a config": changed(**{"_target_": "os.system"}),
    "another shape": changed(**{HEAD: torch.zeros(2, 2)}),
    "no dimension": changed(**{LORA_A: torch.zeros(())}),
    "an empty factor as long as a disk": changed(**{LORA_A: torch.zeros(0, 10**13)}),
    "another dtype": changed(**{HEAD: FIRST[HEAD].double()}),
    "a missing tensor": lambda task: task.data.pop(HEAD),
    "no tensors": lambda task: task.data.clear(),
    "NaN": at(HEAD, math.nan),
    "infinity": at(LORA_A, -math.inf),
    "huge": at(LORA_B, 1e30),
    "another base": spec(base_sha256="0" * 64),
    "another method": spec(method="full"),
    "a larger rank": of_rank(4),
    "a smaller rank": of_rank(1),
    "a rank that it has not": spec(rank=1),
    "a negative rank": spec(rank=-1),
    "a spec of other shapes": lambda task: task.spec["shapes"].update({HEAD: [1]}),
    "a spec with more": spec(code="$import os"),
    "no spec": lambda task: setattr(task, "spec", None),
    "a round before the first": lambda task: setattr(task, "round", -1),
    "a round after the last": lambda task: setattr(task, "round", 2),
    "a round beyond all": lambda task: setattr(task, "round", 10**18),
    "half a round": lambda task: setattr(task, "round", 0.5),
    "a round as text": lambda task: setattr(task, "round", "0"),
    "true as a round": lambda task: setattr(task, "round", False),
    "other frozen factors": lambda task: setattr(task, "fixed", "0" * 64),
    "an offset nobody asked for": offset(0.1, rule="svd"),
    "an infinite offset": offset(math.inf),
    "a huge offset": offset(1e12),
    "an offset whose product is infinite": offset(3e38),
    "an offset of a rank above the base's": offset(1e-3, rank=5000),
    "half an offset": lambda task: (offset(0.1)(task), task.data.pop(f"{STEM}.offset_b")),
    "a control nobody asked for": changed(**{f"control/{HEAD}": FIRST[HEAD]}),
    "an infinite control": lambda task: (
        task.settings.update(optimizer="scaffold", rule="mean"),
        changed(**{f"control/{HEAD}": torch.full_like(FIRST[HEAD], math.inf)})(task),
    ),
    "a huge control": lambda task: (
        task.settings.update(optimizer="scaffold", rule="mean"),
        changed(**{f"control/{HEAD}": torch.full_like(FIRST[HEAD], 1e30)})(task),
    ),
    "a task of another kind": lambda task: setattr(task, "kind", DataKind.METRICS),
    "a field beside": lambda task: task.beside.update(bundle={"_target_": "os.system"}),
    "another task": lambda task: setattr(task, "name", "$import os"),
    "coded bytes nobody asked for": changed(**{messages.CODED: b"x"}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_task_is_refused(hospital: Hospital, kind: str) -> None:
    task = Task()
    HOSTILE[kind](task)
    hospital.refuses(task)


# Faults of an adapter itself, whatever it was sent for.
OF_ADAPTERS = [
    kind
    for kind in HOSTILE
    if not any(word in kind for word in ("round", "smaller", "factors", "field", "task", "kind"))
]


@pytest.mark.parametrize("kind", OF_ADAPTERS)
def test_a_hostile_adapter_is_not_scored_either(hospital: Hospital, kind: str) -> None:
    spoilt = Task(round=SETTINGS["rounds"])
    HOSTILE[kind](spoilt)
    meta = {messages.SPEC: spoilt.spec, messages.ROUND: spoilt.round}
    model = DXO(DataKind.WEIGHTS, spoilt.data, meta)
    for name in ("last", "$import os", "../last"):
        hospital.refuses(
            Task(
                data={name: model},
                kind=DataKind.COLLECTION,
                name=messages.VALIDATE,
                settings=spoilt.settings,
            )
        )


def test_a_whole_adapter_of_a_smaller_rank_is_scored(hospital: Hospital) -> None:
    ours = Task(round=SETTINGS["rounds"])
    of_rank(1)(ours)
    model = DXO(DataKind.WEIGHTS, ours.data, {messages.SPEC: ours.spec, messages.ROUND: ours.round})
    settings = {**SETTINGS, "site_ranks": {"B": 1}}
    reply = hospital.does(
        Task({"site_B": model}, kind=DataKind.COLLECTION, name="validate", settings=settings)
    )
    assert reply.get_return_code() == ReturnCode.OK


def coded(blob: Any) -> Task:
    return Task(
        data={messages.CODED: blob},
        spec={**SPEC.to_dict(), "shapes": {}},
        settings={**SETTINGS, "download": list(DOWNLOAD)},
    )


def right_message() -> bytes:
    link = Downlink(DOWNLOAD, FIRST)
    link.prepare({name: tensor + 0.01 for name, tensor in FIRST.items()})
    message = link.message("A")
    assert message is not None
    return message


def test_a_coded_message_that_is_damaged_or_huge_is_refused(hospital: Hospital) -> None:
    blob = right_message()
    step = max(1, len(blob) // 40)
    damaged = [blob[:place] for place in range(0, len(blob), step)]
    damaged += [
        blob[:place] + bytes([blob[place] ^ 255]) + blob[place + 1 :]
        for place in range(0, len(blob), step)
    ]
    plain = zlib.decompress(blob)
    damaged += [b"", blob + b"\0", plain, zlib.compress(plain + bytes(10**8)), bytes(10**7)]
    for one in damaged:
        hospital.refuses(coded(one))
    for wrong_round in (-1, 2, 10**18, 0.0, "0", None):
        task = coded(blob)
        task.round = wrong_round
        hospital.refuses(task)


def test_an_honest_task_after_all_of_them_works_as_before(
    hospital: Hospital, tmp_path: Path
) -> None:
    fresh = Hospital(tmp_path)
    for task in (Task(), coded(right_message())):
        hospital.refuses(Task(spec={**SPEC.to_dict(), "rank": 9}))
        before = hospital.trained
        one = hospital.does(task)
        assert hospital.trained == before + 1
        other = fresh.does(task)
        assert one.get_return_code() == other.get_return_code() == ReturnCode.OK
        trained, expected = (
            messages.read_dxo(reply, DataKind.WEIGHTS).data for reply in (one, other)
        )
        assert trained.keys() == expected.keys() == FIRST.keys()
        assert all(torch.equal(trained[name], expected[name]) for name in expected)
