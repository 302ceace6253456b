"""A slot: named weights with a step counter, what is accumulated on them, and what was committed."""

from __future__ import annotations

from dataclasses import dataclass, field

from homefire.checkpoints import Manifest, Tensors
from homefire.trainer.engine.network import FrozenWeights, TrainableWeights
from homefire.wire.engine import GradNormalization, LoraSpec, SlotKind, SlotOpened
from homefire.wire.errors import FailedPrecondition, InvalidArgument


@dataclass(frozen=True)
class Accumulated:
    """What the slot's gradient is made of."""

    num_backward_calls: int = 0
    num_loss_tokens: int = 0
    """Tokens whose loss has a non-zero gradient."""
    num_sequences: int = 0
    """Rows with such a token."""

    def plus(self, num_loss_tokens: int, num_sequences: int) -> Accumulated:
        return Accumulated(
            self.num_backward_calls + 1,
            self.num_loss_tokens + num_loss_tokens,
            self.num_sequences + num_sequences,
        )

    def divisor(self, normalization: GradNormalization) -> float:
        """At least 1, so that an empty gradient stays zero."""
        counts = {
            GradNormalization.NONE: 1,
            GradNormalization.NUM_LOSS_TOKENS: self.num_loss_tokens,
            GradNormalization.NUM_SEQUENCES: self.num_sequences,
        }
        return float(max(1, counts[normalization]))


@dataclass(frozen=True)
class Committed:
    """The slot's last committed sampler snapshot: the parent of its next delta."""

    manifest: Manifest
    tensors: Tensors | None
    """Its bits; None after a recovery, until a delta needs them."""


@dataclass
class Slot:
    """Owned and changed by the engine alone."""

    name: str
    kind: SlotKind
    lora: LoraSpec | None
    weights: FrozenWeights
    trained: TrainableWeights | None
    """The same weights where they can be trained; None for a reference."""
    step: int = 0
    """Optimizer steps of this lineage; a loaded state sets it."""
    accumulated: Accumulated = field(default_factory=Accumulated)
    committed: Committed | None = None
    shares_passes: bool = False

    def opened(self) -> SlotOpened:
        return SlotOpened(
            slot=self.name,
            kind=self.kind,
            num_trainable=self.trained.num_trainable if self.trained else 0,
            step=self.step,
            lora=self.lora,
            shares_passes=self.shares_passes,
        )

    def keep_gradient(self, num_loss_tokens: int, num_sequences: int) -> None:
        """What lies aside is accumulated, with what it is made of."""
        self.trainable().keep_gradient()
        self.accumulated = self.accumulated.plus(num_loss_tokens, num_sequences)

    def trainable(self) -> TrainableWeights:
        if self.trained is None:
            raise FailedPrecondition(
                f"slot {self.name!r} is a frozen reference: it takes forward passes only",
                hint="train on the policy's model",
            )
        return self.trained

    def clear_gradient(self) -> None:
        if self.trained is not None:
            self.trained.clear_gradient()
        self.accumulated = Accumulated()


class Slots:
    """The open slots by name."""

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}

    def add(self, slot: Slot) -> None:
        self._slots[slot.name] = slot

    def require_free(self, name: str) -> None:
        if name in self._slots:
            raise FailedPrecondition(f"slot {name!r} is already open")

    def get(self, name: str) -> Slot:
        if name not in self._slots:
            known = ", ".join(self._slots) or "none"
            raise InvalidArgument(f"slot {name!r} is not open", hint=f"open slots: {known}")
        return self._slots[name]

    def pop(self, name: str) -> Slot:
        slot = self.get(name)
        del self._slots[name]
        return slot

    def all(self) -> list[Slot]:
        return list(self._slots.values())
