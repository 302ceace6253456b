"""Which `Host` headers are answered: a page in the user's browser must not reach us by DNS rebinding."""

from __future__ import annotations

from collections.abc import Iterable

from homefire.wire.errors import PermissionDenied

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class HostList:
    """Loopback names and the names given; ports do not matter."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = LOOPBACK_NAMES | {host_name(name) for name in names}

    def check(self, header: str) -> None:
        """Raises PermissionDenied for a host that is not ours."""
        if host_name(header) not in self._names:
            raise PermissionDenied(
                f"the Host header {header!r} is not a name of this gateway",
                hint="start `homefire up` with --advertise-url naming the host that clients use",
            )


def host_name(authority: str) -> str:
    """`example.org:8700` -> `example.org`; `[::1]:8700` -> `::1`; `::1` -> `::1`."""
    authority = authority.strip().lower()
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority if authority.count(":") > 1 else authority.partition(":")[0]
