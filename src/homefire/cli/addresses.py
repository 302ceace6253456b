"""Where `homefire up` listens: the socket, the URL, and who may reach it."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path
from urllib.parse import urlsplit

from homefire.wire.errors import InvalidArgument, PortInUse

_BACKLOG = 4096
_MAX_PORT = 65535


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens already: who connects before the gateway is up waits.

    Raises PortInUse, or InvalidArgument for an address that this machine does not have.
    """
    if not 0 <= port <= _MAX_PORT:
        raise InvalidArgument(f"--port {port} is not a port", hint="use 0 to 65535", field="port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except socket.gaierror as exc:
        raise InvalidArgument(f"--host {host!r} does not resolve ({exc})", field="host") from exc
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} of {host} is in use by another process",
                hint="choose another with --port, or --port 0 for any free one",
            ) from exc
        raise InvalidArgument(
            f"cannot listen on {host} port {port}: {exc.strerror}",
            hint="choose an address of this machine with --host, and a port from 1024 on",
            field="host",
        ) from exc


def url_of(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(
    host: str, *, secure: bool, insecure_http: bool, advertise_url: str | None
) -> None:
    """Off loopback, keys must not travel in clear text unless the user says so."""
    if is_loopback(host):
        return
    if not (secure or insecure_http):
        raise InvalidArgument(
            f"--host {host} can be reached from other machines, and API keys would travel unencrypted",
            hint="give --tls-cert and --tls-key, or --insecure-http if you trust the network",
            field="host",
        )
    if not advertise_url:
        raise InvalidArgument(
            f"--host {host} needs --advertise-url",
            hint="name the URL that clients use, e.g. --advertise-url https://trainer.example:8700",
            field="advertise-url",
        )


def check_tls(certificate: Path | None, key: Path | None) -> None:
    if (certificate is None) != (key is None):
        raise InvalidArgument("--tls-cert and --tls-key belong together", field="tls-cert")
    for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
        if path is not None and not path.expanduser().is_file():
            raise InvalidArgument(f"{option} {path} is not a file", field=option[2:])


def check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise InvalidArgument(
            f"--advertise-url {url!r} is not an http or https URL",
            hint="for example https://trainer.example:8700",
            field="advertise-url",
        )
