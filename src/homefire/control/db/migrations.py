"""The schema, as the steps that lead to it. A step that was released is never edited."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from homefire.wire.errors import HomeTooNew

_FIRST = """
CREATE TABLE api_keys (
    sha256 TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    state TEXT NOT NULL,
    message TEXT NOT NULL,
    config TEXT NOT NULL,
    supervision TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    completed_at REAL
);
CREATE TABLE deployments (
    id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    state TEXT NOT NULL,
    message TEXT NOT NULL,
    config TEXT NOT NULL,
    desired TEXT NOT NULL,
    purge INTEGER NOT NULL,
    ledger_since REAL NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL
);
CREATE TABLE replicas (
    deployment TEXT NOT NULL REFERENCES deployments (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    supervision TEXT NOT NULL,
    leaving INTEGER NOT NULL,
    PRIMARY KEY (deployment, number)
);
CREATE TABLE models (
    account TEXT NOT NULL,
    id TEXT NOT NULL,
    state TEXT NOT NULL,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    operation TEXT NOT NULL,
    worker TEXT,
    digest TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (account, id)
);
CREATE TABLE operations (
    name TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    done INTEGER NOT NULL,
    error_code TEXT NOT NULL,
    error TEXT NOT NULL,
    model TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE TABLE evaluations (
    id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    job TEXT NOT NULL,
    at REAL NOT NULL,
    entry TEXT NOT NULL
);
CREATE TABLE client_metrics (
    job TEXT NOT NULL,
    at REAL NOT NULL,
    step INTEGER NOT NULL,
    metrics TEXT NOT NULL
);
CREATE INDEX client_metrics_of_job ON client_metrics (job, at);
CREATE INDEX evaluations_of_account ON evaluations (account, at);
"""

MIGRATIONS = [_FIRST]
"""MIGRATIONS[n] leads from version n to version n + 1."""


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Brings the database to this version, one transaction per step; refuses a newer one."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise HomeTooNew(
            f"{path} has version {version}, this homefire knows up to {len(MIGRATIONS)}",
            hint="upgrade homefire, or choose another home with --home",
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE;{script}PRAGMA user_version = {number};COMMIT;")
