"""What an engine says about a model's directory, from a process of its own."""

from __future__ import annotations

import msgspec

from homefire.wire.errors import ErrorRecord


class EngineCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Example: EngineCheck(architecture="qwen3", max_context_length=40960, layout="packed")."""

    architecture: str = ""
    max_context_length: int = 0
    """Tokens."""
    layout: str = ""
    """How its rows are computed: `packed` or `padded`."""
    error: ErrorRecord | None = None
    """Why the model can be neither trained nor served."""
