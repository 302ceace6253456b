"""What the owner of training runs, sessions and checkpoints asks for, put together."""

from __future__ import annotations

from dataclasses import dataclass

from homefire.checkpoints import CheckpointStore
from homefire.control.checkpoint_deletion import CheckpointDeletion
from homefire.control.db.database import Database
from homefire.control.download_links import DownloadLinks
from homefire.control.job_activity import Activities
from homefire.control.tinker.checkpoints import Checkpoints
from homefire.control.tinker.copies import Copies
from homefire.control.tinker.listing import Listing
from homefire.foundation.clock import Clock


@dataclass(frozen=True)
class Management:
    """Its parts are used by the routes."""

    checkpoints: Checkpoints
    copies: Copies
    listing: Listing
    links: DownloadLinks

    @classmethod
    def of(
        cls,
        *,
        database: Database,
        store: CheckpointStore,
        deletion: CheckpointDeletion,
        activities: Activities,
        links: DownloadLinks,
        clock: Clock,
    ) -> Management:
        checkpoints = Checkpoints(database, store, deletion, links, clock)
        return cls(
            checkpoints,
            Copies(database, store, checkpoints, clock),
            Listing(database, checkpoints, activities),
            links,
        )
