"""The process that owns the port: it authenticates, routes and streams, and remembers nothing.

Everything that it needs to route is one table, published by control and kept when control is down.
"""
