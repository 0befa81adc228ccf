"""What is evaluated: the adapters of a run, or one file, each put on the base it was trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, equal

from flap_nvflare.adapter.factors import of_rank
from flap_nvflare.adapter.parcel import parcel
from flap_nvflare.adapter.update import UpdateError, content_sha256, load_update
from flap_nvflare.aggregation import card
from flap_nvflare.bundle.trained import LAST_FILE, adapter_file, load_trained
from flap_nvflare.sam.checkpoint import file_sha256
from flap_nvflare.settings import Federation, SettingsError
from flap_nvflare.training.work import SiteWork

FEDERATED = "federated"
KINDS = (FEDERATED, "local", "pooled", "left_out", "adapter")
RUN_FILE, SITES = "run.json", "sites"


@dataclass(frozen=True)
class Model:
    """One adapter to evaluate.

    Attributes:
        name: its name in tables and files.
        kind: one of `KINDS`.
        trained_on: sites whose scans it was trained on; empty if that is not known.
        file: the adapter's file.
        sha256: of the file.
        base_sha256: of the base that it was trained on.
        federation: settings of its network, at the adapter's own rank.
        tensors: what trains and what stays as drawn, by name.
        offset: its change of the base.
    """

    name: str
    kind: str
    trained_on: tuple[str, ...]
    file: Path
    sha256: str
    base_sha256: str
    federation: Federation
    tensors: Mapping[str, Tensor]
    offset: Mapping[str, Tensor]

    def put_on(self, work: SiteWork) -> None:
        """Gives the adapter to a site's network of the same settings and at least its rank.

        Raises:
            UpdateError: if its frozen factors are others than those that are drawn here.
        """
        tensors, fixed = of_rank(self.tensors, work.rank), work.fixed()
        still = {name: tensors[name] for name in fixed if name in tensors}
        if still and content_sha256(still) != content_sha256({name: fixed[name] for name in still}):
            raise UpdateError(
                f"{self.file}: its frozen factors are not those drawn here from the seed; use the "
                "version of torch, and the rank, that it was trained with"
            )
        work.network.set_offset(self.offset)
        work.load_adapter({name: tensors[name] for name in work.parameters})


@dataclass(frozen=True)
class Run:
    """A run's folder, as far as an evaluation needs it.

    Attributes:
        folder: the folder.
        federation: its settings, with every site's rank.
        sites: the sites that trained.
        synthetic: whether it trained on the demo's scans.
        finished: whether it came to its end.
    """

    folder: Path
    federation: Federation
    sites: tuple[str, ...]
    synthetic: bool
    finished: bool


def read_run(folder: Path) -> Run | None:
    """What `run.json` says; None for a file, or a folder that is no federation's.

    Raises:
        SettingsError: if the file is damaged.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
        return Run(
            folder=folder,
            federation=Federation.from_dict(said["federation"]),
            sites=tuple(str(site) for site in said["sites"]),
            synthetic=said.get("data") == "synthetic",
            finished=bool(said.get("finished")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{path}: is no whole run.json ({error}); fetch it again") from error


def read_model(
    name: str,
    kind: str,
    trained_on: tuple[str, ...],
    file: Path,
    checkpoint: str = "",
    sha256: str = "",
) -> Model:
    """Reads and checks an adapter's file; its base must be the one that the file names.

    Raises:
        UpdateError, OtherBaseError, CheckpointError: as `load_trained`.
    """
    trained = load_trained(file, checkpoint, sha256)
    tensors, offset, _ = parcel(load_update(trained.file)[0])
    return Model(
        name=name,
        kind=kind,
        trained_on=trained_on,
        file=trained.file,
        sha256=file_sha256(trained.file),
        base_sha256=trained.spec.base_sha256,
        federation=trained.federation,
        tensors=tensors,
        offset=offset,
    )


def read_models(path: Path, run: Run | None, checkpoint: str = "", sha256: str = "") -> list[Model]:
    """Of a run its best adapter, its last if that is another, and each site's own last.

    Of anything else the one adapter that `bundle.trained.adapter_file` finds.

    Raises:
        UpdateError, OtherBaseError, CheckpointError: as `load_trained`.
        SettingsError: if an adapter was made with other settings than its run, or a part of what
            trains stays at its site.
    """
    base = (checkpoint, sha256)
    if run is None:
        file = adapter_file(path)
        return [read_model(file.stem, "adapter", (), file, *base)]
    _require_whole(run.federation)
    models = [read_model(FEDERATED, FEDERATED, run.sites, adapter_file(path), *base)]
    last = path / LAST_FILE
    if last.is_file():
        found = read_model("last", FEDERATED, run.sites, last, *base)
        if not _same(found, models[0]):
            models.append(found)
    for file in sorted((path / SITES).glob("*.safetensors")):
        models.append(read_model(f"site_{file.stem}", "adapter", run.sites, file, *base))
    for model in models:
        check_settings(model, run)
    return models


def _require_whole(federation: Federation) -> None:
    """Whether a file of the run can be a whole adapter.

    Raises:
        SettingsError: if a part of what trains stays at its site.
    """
    if federation.personal == "head" or card(federation.rule).private:
        what = "personal: head" if federation.personal == "head" else f"rule: {federation.rule}"
        raise SettingsError(
            f"{what}: a part of what trains never leaves its site, so no file of the run is a "
            "whole adapter; what each site scored with its own part is 'last' in cross_site.json"
        )


def check_settings(model: Model, run: Run) -> None:
    """Whether the model's settings are the run's, but for a site's own rank.

    Raises:
        SettingsError: if they are not.
    """
    wanted = dataclasses.replace(run.federation, rank=model.federation.rank, site_ranks={})
    if wanted != model.federation:
        ours, theirs = wanted.to_dict(), model.federation.to_dict()
        name = next(name for name in ours if ours[name] != theirs[name])
        raise SettingsError(
            f"{model.file}: was made with {name}: {theirs[name]!r}, but {run.folder / RUN_FILE} "
            f"says {ours[name]!r}; take the file out of the run"
        )


def _same(one: Model, other: Model) -> bool:
    mine, theirs = ({**model.tensors, **model.offset} for model in (one, other))
    return mine.keys() == theirs.keys() and all(equal(mine[name], theirs[name]) for name in mine)
