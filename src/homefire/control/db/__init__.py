"""The control plane's database: SQLite, one connection, one thread, all SQL in `statements`."""
