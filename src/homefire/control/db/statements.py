"""All SQL of homefire. Every value is bound, and a change of state names the state it leaves."""

# --- keys -------------------------------------------------------------------------------------

# A key is registered at every start; the second time changes nothing.
REGISTER_KEY = """
INSERT OR IGNORE INTO api_keys (sha256, account, created_at) VALUES (?, ?, ?)
"""

# The key in the home's file is the one that holds: an account's older keys are revoked.
REVOKE_OTHER_KEYS = "DELETE FROM api_keys WHERE account = ? AND sha256 != ?"

# All keys, for the gateway.
KEYS = "SELECT sha256, account FROM api_keys ORDER BY created_at"

# An account's key, for people.
KEY_OF_ACCOUNT = "SELECT rowid AS number FROM api_keys WHERE account = ? ORDER BY created_at DESC"

# --- jobs -------------------------------------------------------------------------------------

# A new job; a constraint error means that the id is taken.
INSERT_JOB = """
INSERT INTO jobs (id, account, state, message, config, supervision, created_at, updated_at)
VALUES (:id, :account, :state, :message, :config, :supervision, :created_at, :updated_at)
"""

# One job, tombstones included.
JOB = "SELECT * FROM jobs WHERE id = ?"

# All jobs, oldest first: the order in which they are admitted.
JOBS = "SELECT * FROM jobs ORDER BY created_at, rowid"

# A transition. No row changed means that somebody else moved the job meanwhile.
ADVANCE_JOB = """
UPDATE jobs SET state = :to, message = :message, updated_at = :now, completed_at = :completed_at
WHERE id = :id AND state = :state
"""

# Why a job stays where it is.
NOTE_JOB = "UPDATE jobs SET message = :message, updated_at = :now WHERE id = :id AND state = :state"

# What control knows about the job's process, whatever the state: a pid must never get lost.
SUPERVISE_JOB = "UPDATE jobs SET supervision = :supervision WHERE id = :id"

# What the user changed of a job, whatever its state. A tombstone's age is that of its last update,
# so this is none.
CONFIGURE_JOB = "UPDATE jobs SET config = :config WHERE id = :id"

# --- deployments ------------------------------------------------------------------------------

# A new deployment; a constraint error means that the id is taken.
INSERT_DEPLOYMENT = """
INSERT INTO deployments
    (id, account, state, message, config, desired, purge, ledger_since, created_at, updated_at)
VALUES
    (:id, :account, :state, :message, :config, :desired, 0, 0, :created_at, :updated_at)
"""

# One deployment, tombstones included.
DEPLOYMENT = "SELECT * FROM deployments WHERE id = ?"

# All deployments, oldest first.
DEPLOYMENTS = "SELECT * FROM deployments ORDER BY created_at, rowid"

# A transition of a deployment.
ADVANCE_DEPLOYMENT = """
UPDATE deployments SET state = :to, message = :message, updated_at = :now
WHERE id = :id AND state = :state
"""

# Why a deployment stays where it is.
NOTE_DEPLOYMENT = """
UPDATE deployments SET message = :message, updated_at = :now WHERE id = :id AND state = :state
"""

# What the user changed; the state may change with it (see ADVANCE_DEPLOYMENT).
CONFIGURE_DEPLOYMENT = """
UPDATE deployments SET config = :config, updated_at = :now WHERE id = :id AND state = :state
"""

# The weights that every replica has to serve from now on.
DESIRE_WEIGHTS = """
UPDATE deployments SET desired = :desired, updated_at = :now WHERE id = :id AND state = :state
"""

# Deletion was asked to leave no tombstone.
MARK_PURGE = "UPDATE deployments SET purge = 1 WHERE id = ?"

# The ledger before now is not shown any more.
CLEAR_LEDGER = "UPDATE deployments SET ledger_since = :now WHERE id = :id"

# A tombstone makes room for a new deployment of its id, and a purged one goes.
REMOVE_DEPLOYMENT = "DELETE FROM deployments WHERE id = ? AND state = 'DELETED'"

# --- replicas ---------------------------------------------------------------------------------

# A replica is admitted: from now on it holds its part of the capacity.
INSERT_REPLICA = """
INSERT OR IGNORE INTO replicas (deployment, number, supervision, leaving)
VALUES (:deployment, :number, :supervision, 0)
"""

# All replicas.
REPLICAS = "SELECT * FROM replicas ORDER BY deployment, number"

# One replica.
REPLICA = "SELECT * FROM replicas WHERE deployment = ? AND number = ?"

# What control knows about the replica's process.
SUPERVISE_REPLICA = """
UPDATE replicas SET supervision = :supervision
WHERE deployment = :deployment AND number = :number
"""

# A replica that is not wanted any more and is being stopped.
LEAVE_REPLICA = "UPDATE replicas SET leaving = 1 WHERE deployment = ? AND number = ?"

# A replica's process has gone for good, and its capacity is free.
REMOVE_REPLICA = "DELETE FROM replicas WHERE deployment = ? AND number = ?"

# --- models and operations --------------------------------------------------------------------

# A promotion begins; a constraint error means that the model's name is taken.
INSERT_MODEL = """
INSERT INTO models
    (account, id, state, kind, source, operation, worker, digest, created_at)
VALUES
    (:account, :id, :state, :kind, :source, :operation, NULL, '', :created_at)
"""

# One promoted model.
MODEL = "SELECT * FROM models WHERE account = ? AND id = ?"

# All promoted models.
MODELS = "SELECT * FROM models ORDER BY created_at, rowid"

# The worker that writes the model's files, stored before it is started.
SET_WORKER = "UPDATE models SET worker = :worker WHERE account = :account AND id = :id"

# The model's files are there.
FINISH_MODEL = """
UPDATE models SET state = 'READY', kind = :kind, digest = :digest, worker = NULL
WHERE account = :account AND id = :id AND state = 'UPLOADING'
"""

# A model that was deleted, or whose promotion failed.
REMOVE_MODEL = "DELETE FROM models WHERE account = ? AND id = ?"

# A promotion as the client follows it.
INSERT_OPERATION = """
INSERT INTO operations (name, account, done, error_code, error, model, created_at)
VALUES (:name, :account, 0, '', '', :model, :created_at)
"""

# One operation.
OPERATION = "SELECT * FROM operations WHERE name = ?"

# The end of an operation; without an error it succeeded.
FINISH_OPERATION = """
UPDATE operations SET done = 1, error_code = :error_code, error = :error
WHERE name = :name AND done = 0
"""

# --- records ----------------------------------------------------------------------------------

# What a client evaluated.
INSERT_EVALUATION = """
INSERT INTO evaluations (id, account, job, at, entry) VALUES (:id, :account, :job, :at, :entry)
"""

# An account's evaluations, oldest first.
EVALUATIONS = "SELECT * FROM evaluations WHERE account = ? ORDER BY at, rowid"

# A client's row of a job's record.
INSERT_CLIENT_METRICS = """
INSERT INTO client_metrics (job, at, step, metrics) VALUES (:job, :at, :step, :metrics)
"""

# What clients added to a job's record, oldest first.
CLIENT_METRICS = "SELECT * FROM client_metrics WHERE job = ? ORDER BY at, rowid"

# --- the root Tinker plane --------------------------------------------------------------------

# A new session of a client.
INSERT_TINKER_SESSION = """
INSERT INTO tinker_sessions
    (id, account, tags, user_metadata, display_name, project_id, sdk_version, created_at,
     heartbeat_at)
VALUES
    (:id, :account, :tags, :user_metadata, :display_name, :project_id, :sdk_version, :created_at,
     :heartbeat_at)
"""

# One session.
TINKER_SESSION = "SELECT * FROM tinker_sessions WHERE id = ?"

# An account's sessions, oldest first.
TINKER_SESSIONS = "SELECT * FROM tinker_sessions WHERE account = ? ORDER BY created_at, rowid"

# When clients were last heard of; a finished session stays as it is.
TOUCH_TINKER_SESSION = """
UPDATE tinker_sessions SET heartbeat_at = :heartbeat_at
WHERE id = :id AND finished_at IS NULL AND heartbeat_at < :heartbeat_at
"""

# The end of a session: the first reason stays.
FINISH_TINKER_SESSION = """
UPDATE tinker_sessions
SET finished_at = :finished_at, finish_reason = :finish_reason, finish_detail = :finish_detail
WHERE id = :id AND finished_at IS NULL
"""

# The project that a session is put into.
ASSIGN_PROJECT = "UPDATE tinker_sessions SET project_id = :project_id WHERE id = :id"

# A new training run; a constraint error means that the session has a model of this number.
INSERT_TINKER_RUN = """
INSERT INTO tinker_runs
    (id, account, session, model_seq_id, job, base_model, lora_rank, user_metadata, source_path,
     created_at, last_request_at)
VALUES
    (:id, :account, :session, :model_seq_id, :job, :base_model, :lora_rank, :user_metadata,
     :source_path, :created_at, :last_request_at)
"""

# One training run.
TINKER_RUN = "SELECT * FROM tinker_runs WHERE id = ?"

# An account's training runs, oldest first.
TINKER_RUNS = "SELECT * FROM tinker_runs WHERE account = ? ORDER BY created_at, rowid"

# The training runs of one session.
TINKER_RUNS_OF_SESSION = "SELECT * FROM tinker_runs WHERE session = ? ORDER BY model_seq_id"

# A request for the run came by.
TOUCH_TINKER_RUN = """
UPDATE tinker_runs SET last_request_at = :last_request_at
WHERE id = :id AND last_request_at < :last_request_at
"""

# A sampling session; asked for again it is the same one.
INSERT_SAMPLING_SESSION = """
INSERT OR IGNORE INTO sampling_sessions
    (id, account, session, seq_id, sampler, base_model, model_path, created_at)
VALUES
    (:id, :account, :session, :seq_id, :sampler, :base_model, :model_path, :created_at)
"""

# One sampling session.
SAMPLING_SESSION = "SELECT * FROM sampling_sessions WHERE id = ?"

# The sampling sessions of one session.
SAMPLING_SESSIONS_OF_SESSION = """
SELECT * FROM sampling_sessions WHERE session = ? ORDER BY created_at, rowid
"""

# Finished sessions that a running trainer still keeps the weights of.
UNCLOSED_TINKER_RUNS = """
SELECT DISTINCT runs.session AS session, runs.job AS job
FROM tinker_runs AS runs
JOIN tinker_sessions AS sessions ON sessions.id = runs.session
JOIN jobs ON jobs.id = runs.job
WHERE runs.closed_at IS NULL AND sessions.finished_at IS NOT NULL
    AND jobs.state = 'JOB_STATE_RUNNING'
"""

# The trainer was told.
CLOSE_TINKER_RUNS = """
UPDATE tinker_runs SET closed_at = :now WHERE session = :session AND job = :job AND closed_at IS NULL
"""

# Sessions that may still be there, and the jobs that they train in or sample from.
LIVE_TINKER_SESSIONS = """
SELECT sessions.id AS session, sessions.heartbeat_at AS heartbeat_at, runs.job AS service
FROM tinker_sessions AS sessions JOIN tinker_runs AS runs ON runs.session = sessions.id
WHERE sessions.finished_at IS NULL AND sessions.heartbeat_at > :since
UNION
SELECT sessions.id, sessions.heartbeat_at, sampling.sampler
FROM tinker_sessions AS sessions JOIN sampling_sessions AS sampling ON sampling.session = sessions.id
WHERE sessions.finished_at IS NULL AND sessions.heartbeat_at > :since
"""

# The training runs of an account whose sessions are not over, newest first.
OPEN_TINKER_RUNS = """
SELECT runs.* FROM tinker_runs AS runs JOIN tinker_sessions AS sessions ON sessions.id = runs.session
WHERE runs.account = :account AND sessions.finished_at IS NULL AND sessions.heartbeat_at > :since
ORDER BY runs.created_at DESC, runs.rowid DESC
"""

# What unfinished sessions, heard of lately, sample by path.
PATHS_BEING_SAMPLED = """
SELECT DISTINCT sampling.model_path AS path
FROM sampling_sessions AS sampling JOIN tinker_sessions AS sessions
    ON sessions.id = sampling.session
WHERE sampling.model_path IS NOT NULL
    AND sessions.finished_at IS NULL AND sessions.heartbeat_at > :since
"""

# The runs of such sessions.
LIVE_TINKER_RUNS = """
SELECT runs.id AS run
FROM tinker_runs AS runs JOIN tinker_sessions AS sessions ON sessions.id = runs.session
WHERE sessions.finished_at IS NULL AND sessions.heartbeat_at > :since
"""
