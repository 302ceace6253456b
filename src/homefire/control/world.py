"""All rows at one moment, and what is observed with them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from homefire.control.capacity import Capacity, Ledger
from homefire.control.db import tables
from homefire.control.db.rows import DeploymentRow, JobRow, ReplicaRow
from homefire.control.lifecycle import SeenReplica, SeenTrainer
from homefire.wire.internal import KeyRoute

ReplicaKey = tuple[str, int]
"""A deployment's id and the replica's number in it."""


@dataclass(frozen=True)
class World:
    keys: list[KeyRoute]
    jobs: list[JobRow]
    deployments: list[DeploymentRow]
    replicas: list[ReplicaRow]

    def replicas_of(self, deployment: DeploymentRow) -> list[ReplicaRow]:
        return [row for row in self.replicas if row.deployment == deployment.id]


@dataclass(frozen=True)
class Picture:
    world: World
    trainers: dict[str, SeenTrainer]
    """By job."""
    replicas: dict[ReplicaKey, SeenReplica]


def read_world(connection: sqlite3.Connection) -> World:
    return World(
        keys=tables.keys(connection),
        jobs=tables.jobs(connection),
        deployments=tables.deployments(connection),
        replicas=tables.replicas(connection),
    )


def ledger_of(connection: sqlite3.Connection, capacity: Capacity) -> Ledger:
    """Who holds what now; what is decided on it belongs into the same transaction."""
    world = read_world(connection)
    return Ledger.of(capacity, world.jobs, world.deployments, world.replicas)
