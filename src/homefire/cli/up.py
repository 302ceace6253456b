"""`homefire up`: options checked, the home held, the port bound, and then the supervisor runs."""

from __future__ import annotations

import argparse
import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from homefire.cli.checkpoint_retention import duration_s
from homefire.cli.home_store import check_store
from homefire.cli.options import Commands, add_home, home_of

if TYPE_CHECKING:
    from homefire.foundation.home import Home
    from homefire.wire.specs import ControlSpec, GatewaySpec

DEFAULT_PORT = 8700
DEFAULT_POOL_IDLE_S = 1800.0
DEFAULT_TOMBSTONE_S = 30 * 86400.0

EPILOG = """\
examples:
  homefire up
  homefire up --home /data/homefire --port 0
  homefire up --alias accounts/fireworks/models/qwen3-8b=tiny
  homefire up --store s3://bucket/homefire
  homefire up --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem \\
              --advertise-url https://trainer.example:8700

It stays in the foreground. Ctrl-C or SIGTERM stops it after the state of running jobs is saved, and
the next `up` on the same home resumes them; a second Ctrl-C hurries.
"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "up",
        help="start homefire in the foreground",
        description="Start homefire: gateway, control, and whatever jobs this home was running.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_home(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        help="port; 0 takes a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="RESOURCE=MODEL",
        help="serve a model resource from a catalog name, a Hugging Face repository or a directory",
    )
    parser.add_argument(
        "--model-root",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="clients may name model directories below DIR (beside HOME/models)",
    )
    parser.add_argument(
        "--pool-idle",
        type=float,
        default=DEFAULT_POOL_IDLE_S,
        metavar="SECONDS",
        help="park trainers and samplers of the root Tinker plane that nobody used for so long;"
        " 0: never (default: %(default)g)",
    )
    parser.add_argument(
        "--held-graphs",
        type=float,
        metavar="GIB",
        help="memory that a trainer may use to keep the graph of a custom loss's forward for its"
        " backward; 0: none (default: an eighth of the memory)",
    )
    parser.add_argument(
        "--keep-journals",
        action="store_true",
        help="never trim a trainer's journal, so that `homefire trainer replay` can start at step 0"
        " (it grows by every batch that is sent)",
    )
    parser.add_argument(
        "--store",
        metavar="URL",
        help="keep checkpoints in S3-compatible storage, s3://bucket/prefix; credentials, region and"
        " endpoint come from the environment (AWS_*). The home remembers it",
    )
    parser.add_argument(
        "--tombstone-retention",
        type=duration_s,
        default=DEFAULT_TOMBSTONE_S,
        metavar="TIME",
        help="how long a deleted job's checkpoints stay, e.g. 7d (default: 30d)",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM certificate chain")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM private key")
    parser.add_argument(
        "--insecure-http", action="store_true", help="allow plain HTTP off loopback"
    )
    parser.add_argument(
        "--advertise-url", metavar="URL", help="what clients use to reach this gateway"
    )
    parser.add_argument(
        "--engine",
        choices=("torch", "fake"),
        default="torch",
        help="fake: a numpy bigram model instead of transformers, for tests",
    )
    parser.add_argument(
        "--accelerator",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what trainers and replicas compute on; cuda: one GPU, bfloat16 with float32 masters",
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class UpOptions:
    """Checked on creation: raises InvalidArgument that names the option and the remedy."""

    host: str
    port: int
    aliases: dict[str, str]
    model_roots: tuple[Path, ...]
    tls_certificate: Path | None
    tls_key: Path | None
    insecure_http: bool
    advertise_url: str | None
    engine: str
    pool_idle_s: float = DEFAULT_POOL_IDLE_S
    keep_journals: bool = False
    held_graphs_gib: float | None = None
    accelerator: str = "cpu"
    tombstone_retention_s: float = DEFAULT_TOMBSTONE_S
    store: str | None = None

    def __post_init__(self) -> None:
        from homefire.cli.addresses import check_exposure, check_tls, check_url

        check_pool_idle(self.pool_idle_s)
        check_held_graphs(self.held_graphs_gib)
        check_tls(self.tls_certificate, self.tls_key)
        check_exposure(
            self.host,
            secure=self.tls_certificate is not None,
            insecure_http=self.insecure_http,
            advertise_url=self.advertise_url,
        )
        if self.advertise_url is not None:
            check_url(self.advertise_url)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> UpOptions:
        return cls(
            host=arguments.host,
            port=arguments.port,
            aliases=parse_aliases(arguments.alias),
            model_roots=tuple(existing_directory(root) for root in arguments.model_root),
            tls_certificate=arguments.tls_cert,
            tls_key=arguments.tls_key,
            insecure_http=arguments.insecure_http,
            advertise_url=arguments.advertise_url and arguments.advertise_url.rstrip("/"),
            engine=arguments.engine,
            pool_idle_s=arguments.pool_idle,
            keep_journals=arguments.keep_journals,
            held_graphs_gib=arguments.held_graphs,
            accelerator=arguments.accelerator,
            tombstone_retention_s=arguments.tombstone_retention,
            store=arguments.store and arguments.store.rstrip("/"),
        )


def run(arguments: argparse.Namespace) -> int:
    from homefire.cli.supervisor import Supervisor
    from homefire.foundation.home import HomeLock

    options = UpOptions.of(arguments)
    home = home_of(arguments)
    home.prepare()
    check_store(home, options.store)
    with HomeLock(home) as lock, contextlib.ExitStack() as resources:
        supervisor = Supervisor(home)
        supervisor.take_over()
        listening = resources.enter_context(_listen(options))
        url = _public_url(options, listening)
        lock.publish(url)
        control, gateway = _specs(home, options, url, listening.getsockname()[1])
        return supervisor.run(control, gateway, listening=listening, url=url)


def parse_aliases(texts: list[str]) -> dict[str, str]:
    from homefire.wire.errors import InvalidArgument

    aliases: dict[str, str] = {}
    for text in texts:
        resource, equals, model = text.partition("=")
        if not (resource and equals and model):
            raise InvalidArgument(
                f"--alias {text!r} is not of the form RESOURCE=MODEL",
                hint="for example --alias accounts/fireworks/models/qwen3-8b=tiny",
                field="alias",
            )
        aliases[resource] = model
    return aliases


def check_pool_idle(seconds: float) -> None:
    from homefire.wire.errors import InvalidArgument

    if not 0 <= seconds < float("inf"):
        raise InvalidArgument(
            f"--pool-idle {seconds:g} is not a number of seconds",
            hint="use 0 to park nothing",
            field="pool-idle",
        )


def check_held_graphs(gib: float | None) -> None:
    from homefire.wire.errors import InvalidArgument

    if gib is not None and not 0 <= gib < float("inf"):
        raise InvalidArgument(
            f"--held-graphs {gib:g} is not a number of GiB",
            hint="use 0 to keep none, or leave it out for an eighth of the memory",
            field="held-graphs",
        )


def existing_directory(path: Path) -> Path:
    from homefire.wire.errors import InvalidArgument

    root = path.expanduser().absolute()
    if not root.is_dir():
        raise InvalidArgument(f"--model-root {path} is not a directory", field="model-root")
    return root


def _listen(options: UpOptions) -> socket.socket:
    from homefire.cli.addresses import listen

    return listen(options.host, options.port)


def _public_url(options: UpOptions, listening: socket.socket) -> str:
    from homefire.cli.addresses import url_of

    if options.advertise_url is not None:
        return options.advertise_url
    scheme = "https" if options.tls_certificate is not None else "http"
    return url_of(scheme, options.host, listening.getsockname()[1])


def _specs(home: Home, options: UpOptions, url: str, port: int) -> tuple[ControlSpec, GatewaySpec]:
    import secrets
    from urllib.parse import urlsplit

    from homefire.wire.specs import Accelerator, ControlSpec, EngineKind, GatewaySpec, Upstream

    control = ControlSpec(
        home=str(home.root),
        nonce=secrets.token_hex(16),
        listen=Upstream(home.socket("control"), secrets.token_hex(32)),
        public_url=url,
        aliases=options.aliases,
        model_roots=[str(home.models), *map(str, options.model_roots)],
        engine=EngineKind(options.engine),
        accelerator=Accelerator(options.accelerator),
        pool_idle_s=options.pool_idle_s,
        keep_journals=options.keep_journals,
        tombstone_retention_s=options.tombstone_retention_s,
        held_graph_bytes=_bytes(options.held_graphs_gib),
    )
    gateway = GatewaySpec(
        home=str(home.root),
        nonce=secrets.token_hex(16),
        host=options.host,
        port=port,
        listen=Upstream(home.socket("gateway"), secrets.token_hex(32)),
        control=control.listen,
        tls_certificate=_text(options.tls_certificate),
        tls_key=_text(options.tls_key),
        allowed_hosts=[urlsplit(url).hostname or options.host],
    )
    return control, gateway


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * (1 << 30))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().absolute())
