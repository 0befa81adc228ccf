"""The persistor: where the first adapter comes from and where every round's is written."""

from __future__ import annotations

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants

from flap_nvflare.flare.job import save_round, server_job


class FlapPersistor(ModelPersistor):
    """Makes the first adapter from the seed, or goes on from the last finished round.

    Files are safetensors, written atomically each round; the round stands in the file, so
    adapter and round can't disagree.
    """

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """What goes down in the first round."""
        return make_model_learnable(server_job(fl_ctx).state.parcel().flat(), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Writes the round that has just been aggregated."""
        save_round(server_job(fl_ctx), int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND)))
