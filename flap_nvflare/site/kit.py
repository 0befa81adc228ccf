"""A FLARE startup kit as `nvflare provision` makes it: which files, which server, which keys."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flap_nvflare.settings import HOME_VARIABLE, SettingsError, own_home

CLIENT_FILE = "fed_client.json"
SERVER_FILE = "fed_server.json"
ADMIN_FILE = "fed_admin.json"


@dataclass(frozen=True)
class Kit:
    """A startup kit of a site or of the server.

    Attributes:
        folder: the kit, with `startup` and `local` in it.
        server: whether it is the server's.
        name: name of the site (or server) in the federation.
        host, port: where the server answers.
        identity: name in the server's certificate.
        scheme: FLARE's transport: `grpc`, `tcp` or `http`.
        security: `mtls`, `tls` or `clear`.
        certificate, key, root: PEM files, the certificate's own and that of its issuer.
    """

    folder: Path
    server: bool
    name: str
    host: str
    port: int
    identity: str
    scheme: str
    security: str
    certificate: Path
    key: Path
    root: Path

    @property
    def startup(self) -> Path:
        """Folder of what FLARE's provisioning made; no file in it may be edited."""
        return self.folder / "startup"

    @property
    def local(self) -> Path:
        """Folder of what the site decides."""
        return self.folder / "local"

    def missing(self) -> list[str]:
        """Files without which FLARE does not start, as paths in the kit."""
        needed = [
            *(self.startup / name for name in ("start.sh", "sub_start.sh")),
            self.certificate,
            self.key,
            self.root,
        ]
        paths = [str(path.relative_to(self.folder)) for path in needed if not path.is_file()]
        for name in ("resources.json", "authorization.json", "log_config.json"):
            # The site's own file, else the default that came with the kit.
            if not any((self.local / f"{name}{end}").is_file() for end in ("", ".default")):
                paths.append(f"local/{name}.default")
        return paths


def read_kit(folder: Path) -> Kit:
    """Reads what kind of kit a folder is and whom it connects to.

    Raises:
        SettingsError: if it is no kit of a site or a server, or its file cannot be read.
    """
    startup = folder / "startup"
    if (startup / CLIENT_FILE).is_file():
        return _of_site(folder, startup / CLIENT_FILE)
    if (startup / SERVER_FILE).is_file():
        return _of_server(folder, startup / SERVER_FILE)
    if (startup / ADMIN_FILE).is_file():
        raise SettingsError(
            f"{folder}: an administrator's kit, which runs no site; name the kit of the site, the "
            f"one with startup/{CLIENT_FILE}"
        )
    raise SettingsError(
        f"{folder}: no FLARE startup kit, startup/{CLIENT_FILE} and startup/{SERVER_FILE} are "
        f"missing; name the folder that holds 'startup' and 'local'"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        SettingsError: if it cannot be read as such.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read as JSON ({error}); restore the file") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: holds no JSON object; restore the file")
    return values


def home(kit: Kit | None) -> Path:
    """Folder for what this package keeps: FLAP_HOME, else `flap` in the kit, else at home."""
    if os.environ.get(HOME_VARIABLE) or kit is None:
        return own_home()
    return kit.folder / "flap"


def _of_site(folder: Path, path: Path) -> Kit:
    values = read_json(path)
    return _make(folder, path, values, values.get("client"), server=False)


def _of_server(folder: Path, path: Path) -> Kit:
    values = read_json(path)
    servers = values.get("servers") or [None]
    return _make(folder, path, values, servers[0], server=True)


def _make(folder: Path, path: Path, values: dict[str, Any], own: Any, server: bool) -> Kit:
    """The kit; `own` is the part that names its own keys."""
    try:
        first = values["servers"][0]
        service = first["service"]
        host, _, port = str(service["target"]).rpartition(":")
        identity = str(first.get("identity") or first.get("admin_server") or host)
        return Kit(
            folder=folder,
            server=server,
            name=identity if server else str(own["fqsn"]).rpartition(".")[2],
            host=host.strip("[]"),
            port=int(port),
            identity=identity,
            scheme=str(service.get("scheme", "grpc")),
            security=str(own.get("connection_security", "mtls")),
            certificate=folder / "startup" / str(own["ssl_cert"]),
            key=folder / "startup" / str(own["ssl_private_key"]),
            root=folder / "startup" / str(own["ssl_root_cert"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise SettingsError(
            f"{path}: not as FLARE's provisioning writes it ({type(error).__name__}: {error}); "
            f"unpack the kit again"
        ) from error
