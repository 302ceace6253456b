"""Whether all planes answer: asked through the front door, as a client would."""

from __future__ import annotations

import http.client
import ssl
import threading

_ATTEMPT_TIMEOUT_S = 30.0
_PAUSE_S = 0.05


def wait_until_answering(
    address: tuple[str, int], *, key: str, secure: bool, given_up: threading.Event
) -> bool:
    """Blocks until control answers through the gateway; False when `given_up` was set first.

    The listening socket exists before the gateway, and the gateway holds a request until control
    is there, so that one attempt is nearly always enough.
    """
    while not given_up.is_set():
        if _answers(address, key=key, secure=secure):
            return True
        given_up.wait(_PAUSE_S)
    return False


def _answers(address: tuple[str, int], *, key: str, secure: bool) -> bool:
    connection = _connect(address, secure=secure)
    try:
        connection.request("GET", "/v1/accounts?pageSize=1", headers={"X-API-Key": key})
        response = connection.getresponse()
        response.read()
        return response.status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _connect(address: tuple[str, int], *, secure: bool) -> http.client.HTTPConnection:
    host, port = address
    if not secure:
        return http.client.HTTPConnection(host, port, timeout=_ATTEMPT_TIMEOUT_S)
    # Our own gateway on this machine, whose certificate names the host that clients use.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=_ATTEMPT_TIMEOUT_S, context=context)
