"""`python -m homefire.gateway SPEC [--fd N]`: serves until SIGTERM.

With `--fd` the listening socket is inherited from the supervisor, which keeps it open while a
gateway is replaced: clients that connect meanwhile wait instead of being refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from homefire.foundation import logs
from homefire.foundation.failpoints import check_allowed
from homefire.foundation.supervised import end_with_supervisor
from homefire.gateway.app import gateway_app
from homefire.http.serve import serve_descriptor, serve_tcp
from homefire.wire.specs import GatewaySpec, read_spec

_GRACEFUL_S = 1
"""The supervisor stops the gateway last, when what requests wait for has stopped already."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m homefire.gateway")
    parser.add_argument("spec", type=Path, help="JSON file with a GatewaySpec")
    parser.add_argument("--fd", type=int, help="inherited listening socket")
    arguments = parser.parse_args()
    logs.configure("gateway")
    spec = read_spec(arguments.spec, GatewaySpec)
    check_allowed(spec.host)
    app = gateway_app(spec)
    end_with_supervisor()
    if arguments.fd is None:
        serve_tcp(
            app, host=spec.host, port=spec.port, certificate=spec.tls_certificate, key=spec.tls_key
        )
    else:
        serve_descriptor(
            app,
            descriptor=arguments.fd,
            certificate=spec.tls_certificate,
            key=spec.tls_key,
            graceful_s=_GRACEFUL_S,
        )


if __name__ == "__main__":
    main()
