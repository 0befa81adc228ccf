"""The persistor: where the first adapter comes from and where every round's is written."""

from __future__ import annotations

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import (
    ModelLearnable,
    ModelLearnableKey,
    make_model_learnable,
)
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants

from flap_nvflare.flare.job import server_job
from flap_nvflare.flare.run import LAST


class FlapPersistor(ModelPersistor):
    """Makes the first adapter from the seed, or goes on from the last finished round.

    Files are safetensors, written atomically each round; the round stands in the file, so
    adapter and round can't disagree.
    """

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """The global adapter to start from."""
        job = server_job(fl_ctx)
        return make_model_learnable(dict(job.start_tensors), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Writes `adapter_last.safetensors` of the round that has just been aggregated."""
        job = server_job(fl_ctx)
        round_index = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
        # The line first: a kill between the two leaves a line that the resume cuts off.
        job.folder.append_round(job.round_line(round_index))
        tensors = model[ModelLearnableKey.WEIGHTS]
        job.folder.save(LAST, tensors, job.spec, rounds=round_index + 1, turned=job.turned)
