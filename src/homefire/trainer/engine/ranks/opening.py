"""Bringing up the ranks of one torch engine: build the model everywhere, meet, read a part each."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path

from homefire.foundation.failpoints import failpoint
from homefire.model.device import device_of
from homefire.model.layout import RowLayout
from homefire.model.loading import LoadedModel, load_model
from homefire.model.partial_loading import model_without_weights, verified
from homefire.trainer.engine.engine import OpenNetwork, SlotEngine
from homefire.trainer.engine.ranks import commands
from homefire.trainer.engine.ranks.commands import LinkToFirst, LinkToRank
from homefire.trainer.engine.ranks.follower import Follower
from homefire.trainer.engine.ranks.leader import RankedNetwork, Ranks
from homefire.trainer.engine.ranks.pass_collectives import PassCollectives
from homefire.trainer.engine.ranks.rank_group import RankGroup, RankPlace
from homefire.trainer.engine.ranks.rank_passes import RankPasses
from homefire.trainer.engine.ranks.sharding import (
    ManyRanks,
    materialise,
    read_own_parts,
    shard_model,
)
from homefire.trainer.engine.torch_engine import TorchNetwork, network_of, prepare_process
from homefire.wire.engine import OpenModel
from homefire.wire.errors import Unsupported
from homefire.wire.specs import Accelerator

log = logging.getLogger(__name__)


class TorchJoining:
    """Implements `Joining`. A model that cannot be loaded is everybody's error, before they meet."""

    def __init__(self, place: RankPlace) -> None:
        self._place = place
        self._collectives = PassCollectives(place.rank)
        self.passes = RankPasses(self._collectives)
        self._loaded: tuple[LoadedModel, OpenModel] | None = None

    def load(self, request: OpenModel) -> None:
        """Without its weights, where every rank can read its own part of them later."""
        if request.accelerator is not Accelerator.CPU:
            raise Unsupported(
                f"several ranks compute on CPUs, not on {request.accelerator.value}",
                hint="ask for one rank",
            )
        prepare_process(request)
        directory, dtype = Path(request.model_dir), request.serving_dtype
        model = model_without_weights(directory, serving_dtype=dtype)
        if model is None:
            log.info("the files of %s are converted as a whole, on every rank", directory)
            model = load_model(directory, serving_dtype=dtype)
        self._loaded = model, request
        failpoint(f"rank.{self._place.rank}.loaded")

    def join(self) -> TorchNetwork:
        if self._loaded is None:
            raise TypeError("the model is loaded before the ranks meet")
        model, request = self._loaded
        is_unread, device = model.device.type == "meta", device_of(request.accelerator)
        group = RankGroup.join(self._place, device)
        model = shard_model(model, group)
        assert model.root is not None
        self._collectives.watch(model.root)
        if is_unread:
            materialise(model.root, device)
            read_own_parts(model, group, Path(request.model_dir))
            model = verified(model)
        _refuse_padded(model)
        spool = Path(request.store_root)
        return network_of(model, request, ManyRanks(group, spool=spool, reads_parts=is_unread))


def _refuse_padded(model: LoadedModel) -> None:
    if model.layout is RowLayout.PADDED:
        # Ranks cut their own rows into padded batches: one with more of them would wait for ever.
        raise Unsupported(
            f"{model.architecture} carries state between tokens: it trains on one rank only",
            hint="ask for one rank",
        )


def open_ranked(place: RankPlace, links: Sequence[LinkToRank]) -> OpenNetwork:
    """How rank 0 opens its network."""

    def open_network(request: OpenModel) -> RankedNetwork:
        ranks, joining = Ranks(links), TorchJoining(place)
        ranks.do(commands.LoadModel(request), lambda: joining.load(request))
        own, _ = ranks.do(commands.JoinRanks(), joining.join)
        return RankedNetwork(own, ranks, joining.passes)

    return open_network


def ranked_engine(place: RankPlace, connections: Sequence[socket.socket]) -> SlotEngine:
    """Rank 0; `connections` lead to ranks 1, 2, …"""
    links = [
        LinkToRank(rank, connection, timeout_s=place.timeout_s)
        for rank, connection in enumerate(connections, start=1)
    ]
    return SlotEngine(open_ranked(place, links))


def follow_first(place: RankPlace, connection: socket.socket) -> None:
    """Any other rank; returns when rank 0 has gone."""
    Follower(LinkToFirst(connection), TorchJoining(place)).serve()
