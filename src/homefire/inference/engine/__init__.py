"""Generating tokens: the engine protocol, continuous batching, and the networks under it."""
