"""Bringing up the ranks of one torch engine: load everywhere, meet, then keep a part each."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from homefire.model.layout import RowLayout
from homefire.model.loading import LoadedModel
from homefire.trainer.engine.engine import OpenNetwork, SlotEngine
from homefire.trainer.engine.ranks import commands
from homefire.trainer.engine.ranks.commands import LinkToFirst, LinkToRank
from homefire.trainer.engine.ranks.follower import Follower
from homefire.trainer.engine.ranks.leader import RankedNetwork, Ranks
from homefire.trainer.engine.ranks.rank_group import RankGroup, RankPlace
from homefire.trainer.engine.ranks.sharding import ManyRanks, shard_model
from homefire.trainer.engine.torch_engine import TorchNetwork, load, network_of
from homefire.wire.engine import OpenModel
from homefire.wire.errors import Unsupported
from homefire.wire.specs import Accelerator


class TorchJoining:
    """Implements `Joining`. A model that cannot be loaded is everybody's error, before they meet."""

    def __init__(self, place: RankPlace) -> None:
        self._place = place
        self._loaded: tuple[LoadedModel, OpenModel] | None = None

    def load(self, request: OpenModel) -> None:
        if request.accelerator is not Accelerator.CPU:
            raise Unsupported(
                f"several ranks compute on CPUs, not on {request.accelerator.value}",
                hint="ask for one rank",
            )
        model = load(request)
        if model.layout is RowLayout.PADDED:
            # Ranks cut their own rows into padded batches: one with more of them would wait for ever.
            raise Unsupported(
                f"{model.architecture} carries state between tokens: it trains on one rank only",
                hint="ask for one rank",
            )
        self._loaded = model, request

    def join(self) -> TorchNetwork:
        if self._loaded is None:
            raise TypeError("the model is loaded before the ranks meet")
        model, request = self._loaded
        group = RankGroup.join(self._place, model.device)
        return network_of(shard_model(model, group), request, ManyRanks(group))


def open_ranked(place: RankPlace, links: Sequence[LinkToRank]) -> OpenNetwork:
    """How rank 0 opens its network."""

    def open_network(request: OpenModel) -> RankedNetwork:
        ranks, joining = Ranks(links), TorchJoining(place)
        ranks.do(commands.LoadModel(request), lambda: joining.load(request))
        own, _ = ranks.do(commands.JoinRanks(), joining.join)
        return RankedNetwork(own, ranks)

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
