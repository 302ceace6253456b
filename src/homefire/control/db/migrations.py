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

_ROOT_PLANE = """
CREATE TABLE tinker_sessions (
    id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    tags TEXT NOT NULL,
    user_metadata TEXT NOT NULL,
    display_name TEXT,
    project_id TEXT,
    sdk_version TEXT,
    created_at REAL NOT NULL,
    heartbeat_at REAL NOT NULL,
    finished_at REAL,
    finish_reason TEXT,
    finish_detail TEXT
);
CREATE INDEX tinker_sessions_of_account ON tinker_sessions (account, created_at);
CREATE TABLE tinker_runs (
    id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    session TEXT NOT NULL REFERENCES tinker_sessions (id),
    model_seq_id INTEGER NOT NULL,
    job TEXT NOT NULL REFERENCES jobs (id),
    base_model TEXT NOT NULL,
    lora_rank INTEGER NOT NULL,
    user_metadata TEXT NOT NULL,
    source_path TEXT,
    created_at REAL NOT NULL,
    last_request_at REAL NOT NULL,
    closed_at REAL
);
CREATE INDEX tinker_runs_of_account ON tinker_runs (account, created_at);
CREATE INDEX tinker_runs_of_session ON tinker_runs (session);
CREATE INDEX open_tinker_runs ON tinker_runs (job) WHERE closed_at IS NULL;
CREATE TABLE sampling_sessions (
    id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    session TEXT NOT NULL REFERENCES tinker_sessions (id),
    seq_id INTEGER NOT NULL,
    sampler TEXT NOT NULL,
    base_model TEXT NOT NULL,
    model_path TEXT,
    created_at REAL NOT NULL
);
CREATE INDEX sampling_sessions_of_session ON sampling_sessions (session);
"""

MIGRATIONS = [_FIRST, _ROOT_PLANE]
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
