"""The gate of a site's own policy: what passes is the site's to say, whatever the job's file says.

`local/privacy.json` names it, so FLARE applies it to every task of every job, before the job's own
filters. What a filter of the job adds afterwards it does not see; that is the last gate's matter.
"""

from __future__ import annotations

from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from flap_nvflare.flare.context import read_limits
from flap_nvflare.flare.error_log import tells_why
from flap_nvflare.flare.filters import bare_error, check_body
from flap_nvflare.site.limits import Limits


class SiteGate(Filter):
    """Lets through what `filters.AdapterOnlyFilter` does under one of the site's own methods.

    The methods are `limits.methods` of `flap_site.yaml`, the names of `named` its
    `limits.parameters`; without the file, all but `full` and `named`.

    Args:
        offset: see there; for messages to the site.
    """

    def __init__(self, offset: bool = False) -> None:
        super().__init__()
        self.offset = offset

    @tells_why
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Returns the message untouched.

        Raises:
            ContentBlockedException: if it passes under none of the methods.
            SettingsError: if the site's file holds a bad value; nothing passes then.
        """
        if shareable.get_return_code(ReturnCode.OK) != ReturnCode.OK:
            return bare_error(shareable)
        limits = read_limits(fl_ctx) or Limits()
        for method in limits.methods:
            try:
                check_body(shareable, method, self.offset, limits.parameters)
                return shareable
            except ContentBlockedException as error:
                blocked = error
        raise ContentBlockedException(
            f"not under any of this site's methods {list(limits.methods)}: {blocked}"
        ) from blocked
