"""The same federation as Python: a recipe for FLARE's SimEnv, PocEnv and ProdEnv.

    from nvflare.recipe import SimEnv
    from flap_nvflare.flare.recipe import FlapRecipe

    FlapRecipe(method="flap", rank=16).execute(SimEnv(clients=list("ABCDEF")))

Defaults are those of `jobs/fed_kits`, since both come from `settings.Federation`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import (
    FullModelShareableGenerator,
)
from nvflare.job_config.api import FedJob
from nvflare.job_config.defs import FilterType
from nvflare.recipe.sim_env import SimEnv
from nvflare.recipe.spec import ExecEnv, Recipe

from flap_nvflare.combinations import check
from flap_nvflare.flare import messages
from flap_nvflare.flare.aggregator import FlapAggregator
from flap_nvflare.flare.coding import (
    DecodeAdapter,
    DecodeUpdate,
    EncodeAdapter,
    EncodeUpdate,
    PrivacyFilter,
)
from flap_nvflare.flare.controller import FlapController
from flap_nvflare.flare.encryption import DecryptAdapter, EncryptUpdate
from flap_nvflare.flare.executor import FlapExecutor
from flap_nvflare.flare.filters import AdapterOnlyFilter
from flap_nvflare.flare.names import plain_name
from flap_nvflare.flare.persistor import FlapPersistor
from flap_nvflare.settings import Federation

PACKAGE = "flap_nvflare"


class FlapRecipe(Recipe):
    """Federated fine-tuning of SAM as a FLARE recipe.

    Args:
        name: name of the job, the folder of its runs.
        profile: `auto`, `demo` or `paper`, as in `federation.yaml`.
        **changes: any setting of `Federation`.

    Raises:
        SettingsError: on an unknown setting or a bad value.
    """

    def __init__(self, name: str = "fed_kits", profile: str = "auto", **changes: Any) -> None:
        self.federation = Federation.of_profile(profile, changes)
        check(self.federation)
        job = FedJob(name=plain_name(name), min_clients=max(1, self.federation.min_sites))
        # The sites run the package that is installed there: no code travels with the job.
        job.set_app_packages([PACKAGE])
        job.to_server(
            FlapController(
                federation=self.federation.to_dict(),
                run_name=name,
                aggregator_id=job.to_server(FlapAggregator(), id="aggregator"),
                persistor_id=job.to_server(FlapPersistor(), id="persistor"),
                shareable_generator_id=job.to_server(
                    FullModelShareableGenerator(), id="shareable_generator"
                ),
            ),
            id="flap",
        )
        train = [messages.TRAIN]
        job.to_server(EncodeAdapter(), filter_type=FilterType.TASK_DATA, tasks=train)
        job.to_server(DecodeUpdate(), filter_type=FilterType.TASK_RESULT, tasks=train)
        super().__init__(job)

    def _prepare_client_apps(self) -> None:
        tasks = [messages.TRAIN, messages.VALIDATE, messages.SUBMIT_MODEL]
        self._job.to_clients(FlapExecutor(), tasks=tasks)
        method, names = self.federation.method, self.federation.parameters
        incoming = AdapterOnlyFilter(method, offset=True, parameters=names)
        for one in (DecryptAdapter(), incoming, DecodeAdapter()):
            self._job.to_clients(one, filter_type=FilterType.TASK_DATA, tasks=tasks)
        encrypt = EncryptUpdate(self.federation.encryption)
        private = PrivacyFilter(self.federation.dp_clip, self.federation.dp_noise)
        outgoing = AdapterOnlyFilter(method, parameters=names)
        for one in (private, EncodeUpdate(), outgoing, encrypt):
            self._job.to_clients(one, filter_type=FilterType.TASK_RESULT, tasks=tasks)

    def process_env(self, env: ExecEnv) -> None:
        """Lets the simulator load this package's components, as a real site's policy does."""
        super().process_env(env)
        if isinstance(env, SimEnv):
            allow_components(Path(env.workspace_root) / self.name / "local")


def allow_components(local: Path) -> None:
    """Adds this package to the class allow-list in the folder `local` of a FLARE workspace."""
    local.mkdir(parents=True, exist_ok=True)
    path = local / "resources.json"
    resources = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    resources.setdefault("format_version", 2)
    allowed = list(resources.get("class_allow_list", DEFAULT_CLASS_ALLOW_LIST))
    if f"{PACKAGE}." not in allowed:
        allowed.append(f"{PACKAGE}.")
    resources["class_allow_list"] = allowed
    path.write_text(json.dumps(resources, indent=2), encoding="utf-8")
