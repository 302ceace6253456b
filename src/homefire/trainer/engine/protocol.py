"""What a trainer front may ask of its engine: one method per request of `homefire.wire.engine`."""

from __future__ import annotations

from typing import Protocol

from homefire.trainer.engine.saves import PreparedSave
from homefire.wire.engine import (
    AdoptSnapshot,
    Arrays,
    CloseSlot,
    Digest,
    DiscardGradients,
    Done,
    Forward,
    ForwardBackward,
    GradientsDiscarded,
    LoadAdapter,
    LoadRecovery,
    LoadState,
    ModelOpened,
    OpenModel,
    OpenSlot,
    OptimStep,
    PackedForwardBackward,
    RecoveryLoaded,
    Rows,
    RowsByMember,
    SamplerSaved,
    SaveReply,
    SaveRequest,
    SlotOpened,
    StateLoaded,
    Stepped,
    WeightsDigest,
)


class EngineUnusable(Exception):
    """The engine is in a state that nothing but a new start repairs, e.g. a rank of it was lost. Its
    process ends, and the front replays."""


class TrainingEngine(Protocol):
    """Every method blocks until done, and runs in the one thread that owns the model.

    A HomefireError means that the operation changed nothing and the engine goes on; the one exception
    is an `optim_step` refused for a non-finite gradient, which clears that gradient. The semantics of
    each verb are those of its request's docstring.
    """

    def open_model(self, request: OpenModel) -> ModelOpened: ...

    def open_slot(self, request: OpenSlot) -> SlotOpened: ...

    def close_slot(self, request: CloseSlot) -> Done: ...

    def forward(self, request: Forward, arrays: Arrays) -> tuple[Rows, Arrays]: ...

    def forward_backward(self, request: ForwardBackward, arrays: Arrays) -> tuple[Rows, Arrays]: ...

    def forward_backward_packed(
        self, request: PackedForwardBackward, arrays: Arrays
    ) -> tuple[RowsByMember, Arrays]: ...

    def optim_step(self, request: OptimStep) -> Stepped: ...

    def discard_gradients(self, request: DiscardGradients) -> GradientsDiscarded: ...

    def prepare_save(self, request: SaveRequest) -> PreparedSave[SaveReply]:
        """Nothing is written yet. What it gives must be kept, or written, before the next call."""
        ...

    def adopt_snapshot(self, request: AdoptSnapshot) -> SamplerSaved: ...

    def load_state(self, request: LoadState) -> StateLoaded: ...

    def load_adapter(self, request: LoadAdapter) -> StateLoaded: ...

    def load_recovery(self, request: LoadRecovery) -> RecoveryLoaded: ...

    def weights_digest(self, request: WeightsDigest) -> Digest: ...

    def free_expired(self) -> float | None:
        """Frees what was kept for requests that did not come; seconds until more expires, if any."""
        ...
