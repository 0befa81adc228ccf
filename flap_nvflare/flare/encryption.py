"""Encrypted rounds: the sites' filters that seal and open, and the keys of either side.

With `encryption: he` a site seals what it sends, the server adds what it can't read, and the
sites open the sum. Everything between the filters carries two tensors of bytes in the place of
the adapter: persistor, files, cross-site evaluation and ledger need to know no more.

The keys are FLARE's: `nvflare provision` with the builder

    - path: nvflare.lighter.impl.he.HEBuilder
      args: {poly_modulus_degree: 8192, coeff_mod_bit_sizes: [60, 60], scale_bits: 45}

before its SignatureBuilder puts `client_context.tenseal`, with the secret key, into every site's
startup kit and `server_context.tenseal`, without it, into the server's. Its default sizes work as
well and make every message twice as long. FLARE's own encrypting filters are not used: they
take numpy arrays only, seal tensor by tensor with a copy of the context in each (195 bytes a number
for the demo's 73 tensors, where one vector of all takes 33), lose shapes, and check nothing.

The simulator has no startup kits. There the keys are made in FLAP_HOME, where the server's
process could read them: it shows that the rounds work, and hides nothing.
"""

from __future__ import annotations

from filelock import FileLock
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from flap_nvflare.adapter.cipher import SEALED, Cipher, CipherError, make_keys
from flap_nvflare.adapter.update import UpdateSpec, write_atomic
from flap_nvflare.flare import messages
from flap_nvflare.flare.context import home, read_federation, simulated
from flap_nvflare.flare.error_log import tells_why
from flap_nvflare.settings import Federation, SettingsError

SITE_CONTEXT, SERVER_CONTEXT = "client_context.tenseal", "server_context.tenseal"
HE = "he"


def server_cipher(fl_ctx: FLContext, federation: Federation) -> Cipher | None:
    """The server's end, None without encryption.

    Raises:
        SettingsError: if the server has the secret key.
        CipherError: if there is no context.
    """
    if federation.encryption != HE:
        return None
    cipher = _load(fl_ctx, SERVER_CONTEXT)
    if cipher.opens:
        raise SettingsError(
            f"{SERVER_CONTEXT} holds the secret key, so the server could read every update; "
            "provision the federation anew"
        )
    return cipher


class _CipherFilter(Filter):
    """A filter that has the site's key, once it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._cipher: Cipher | None = None

    def cipher(self, fl_ctx: FLContext) -> Cipher:
        """The site's end."""
        if self._cipher is None:
            self._cipher = _load(fl_ctx, SITE_CONTEXT)
        return self._cipher


class EncryptUpdate(_CipherFilter):
    """Seals the tensors that leave a site; the last of its result filters.

    Args:
        encryption: `he`, or `none` for a filter that does nothing; empty reads the setting from
            the job's own `federation.yaml` at this site. In a site's own policy, `he` encrypts
            whatever the job says.
    """

    def __init__(self, encryption: str = "") -> None:
        super().__init__()
        self.encryption = encryption

    @tells_why
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The message with its weights sealed; metrics and error replies as they are.

        Raises:
            ContentBlockedException: if there is something that can't be sealed.
        """
        if shareable.get_return_code(ReturnCode.OK) != ReturnCode.OK or "DXO" not in shareable:
            return shareable
        if (self.encryption or read_federation(fl_ctx).encryption) != HE:
            return shareable
        try:
            dxo = from_shareable(shareable)
            if dxo.data_kind == DataKind.METRICS:
                return shareable
            if dxo.data_kind != DataKind.WEIGHTS:
                raise CipherError(f"a DXO of kind {dxo.data_kind!r} can't be sealed")
            if set(dxo.data) == SEALED:  # by the site's own policy
                return shareable
            spec = UpdateSpec.from_dict(dxo.meta.get(messages.SPEC))
            weight = float(dxo.meta.get(messages.WEIGHT, 1.0))
            sealed = self.cipher(fl_ctx).seal(dxo.data, spec, weight)
        except Exception as error:  # in doubt nothing leaves
            raise ContentBlockedException(f"not encrypted, so not sent: {error}") from error
        return DXO(DataKind.WEIGHTS, data=sealed, meta=dxo.meta).update_shareable(shareable)


class DecryptAdapter(_CipherFilter):
    """Opens the sealed tensors that a site gets; the first of its task data filters."""

    @tells_why
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The message with every sealed adapter open; anything else as it is.

        Raises:
            ContentBlockedException: if something sealed can't be opened.
        """
        if "DXO" not in shareable:
            return shareable
        try:
            dxo = from_shareable(shareable)
            opened = self._opened(dxo, fl_ctx)
        except Exception as error:  # FLARE and TenSEAL raise several types for what a peer sends
            raise ContentBlockedException(f"can't be opened: {error}") from error
        return shareable if opened is dxo else opened.update_shareable(shareable)

    def _opened(self, dxo: DXO, fl_ctx: FLContext) -> DXO:
        if dxo.data_kind == DataKind.COLLECTION:
            parts = {
                name: self._opened(part, fl_ctx) if isinstance(part, DXO) else part
                for name, part in dict(dxo.data).items()
            }
            if all(parts[name] is part for name, part in dict(dxo.data).items()):
                return dxo
            return DXO(DataKind.COLLECTION, data=parts, meta=dxo.meta)
        if dxo.data_kind != DataKind.WEIGHTS or set(dxo.data) != SEALED:
            return dxo
        spec = UpdateSpec.from_dict(dxo.meta.get(messages.SPEC))
        tensors = self.cipher(fl_ctx).open(dict(dxo.data), spec)
        return DXO(DataKind.WEIGHTS, data=tensors, meta=dxo.meta)


def _load(fl_ctx: FLContext, name: str) -> Cipher:
    """The context from the startup kit, its signature checked by FLARE; see the module.

    Raises:
        CipherError: if there is none, or tenseal is not installed.
    """
    if simulated(fl_ctx):
        return Cipher(_simulated_key(name, fl_ctx))
    try:
        from nvflare.app_opt.he.homomorphic_encrypt import load_tenseal_context_from_workspace
    except ImportError as error:
        raise CipherError(
            "encryption needs the package tenseal: pip install 'flap_nvflare[privacy]'"
        ) from error
    try:
        return Cipher(load_tenseal_context_from_workspace(name, fl_ctx))
    except Exception as error:  # FLARE and TenSEAL raise several types
        raise CipherError(
            # A line at most: what follows may show the context itself.
            f"{name} in the startup kit: {str(error).splitlines()[0][:100]}; provision with "
            "FLARE's HEBuilder, before its SignatureBuilder"
        ) from error


def _simulated_key(name: str, fl_ctx: FLContext) -> bytes:
    """The simulator's contexts, made once for all its processes."""
    folder = home(fl_ctx) / "simulated_keys"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(folder / "lock"):
        if not (folder / SERVER_CONTEXT).is_file():
            site, server = make_keys()
            write_atomic(folder / SITE_CONTEXT, site)
            write_atomic(folder / SERVER_CONTEXT, server)
    return (folder / name).read_bytes()
