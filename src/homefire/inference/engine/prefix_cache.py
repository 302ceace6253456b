"""Which prompts' keys and values are kept, in which blocks of the network's pool.

A prefix is kept in whole blocks, each known by the weights, the block before it and its own tokens. So a
group of samples, a later turn of a dialogue or a prompt with the same instructions finds what another
sequence computed; sequences of other weights never do.

    lookup ──▶ lease (blocks pinned) ──extend──▶ blocks to fill ──commit──▶ found by others
                  └── release: unpinned blocks stay until room is needed, least recently used first
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from homefire.wire.errors import EngineFailed


@dataclass(eq=False)
class Block:
    """One block of the pool. It lives as long as a block after it does, or a lease."""

    id: int
    key: BlockKey
    num_pins: int = 0
    num_children: int = 0
    made_with: str = ""
    """Digest of the weights that filled it; the key says so too, and must not be trusted alone."""


BlockKey = tuple[str, "Block | None", tuple[int, ...]]
"""(digest of the weights, the block before, the block's own tokens)"""


@dataclass(eq=False)
class Lease:
    """The blocks of one prompt's beginning, which stay as they are until it is released."""

    digest: str
    blocks: list[Block] = field(default_factory=list)
    num_committed: int = 0
    """Of the blocks; the others are to be filled."""

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(block.id for block in self.blocks)


class PrefixCache:
    """Bounded by the pool. Used by one thread."""

    def __init__(self, *, num_blocks: int, block_tokens: int) -> None:
        """No blocks: nothing is ever found."""
        self.block_tokens = block_tokens
        self._num_blocks = num_blocks
        self._num_taken = 0
        self._free: list[int] = []
        self._blocks: dict[BlockKey, Block] = {}
        self._evictable: OrderedDict[Block, None] = OrderedDict()
        """Neither pinned nor before another block; least recently used first."""
        self._coming: set[BlockKey] = set()
        """Being filled under a lease."""

    @property
    def num_used(self) -> int:
        return self._num_taken - len(self._free)

    def lookup(self, digest: str, tokens: Sequence[int]) -> Lease:
        """The longest beginning that is kept, in whole blocks; perhaps none. EngineFailed when what is found
        was made with other weights: the caller starts over with an empty cache."""
        lease = Lease(digest)
        for key in self._keys(lease, tokens):
            block = self._blocks.get(key)
            if block is None:
                break
            self._check_version(block, digest)
            self._pin(block)
            lease.blocks.append(block)
        lease.num_committed = len(lease.blocks)
        return lease

    def is_coming(self, lease: Lease, tokens: Sequence[int]) -> bool:
        """Whether somebody else is filling the block that this prompt lacks first."""
        return next(self._keys(lease, tokens), None) in self._coming

    def extend(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Blocks for as many of the following whole blocks of tokens as there is room for."""
        for key in self._keys(lease, tokens):
            block_id = self._take_id()
            if block_id is None:
                return
            lease.blocks.append(Block(block_id, key, num_pins=1))
            self._coming.add(key)

    def commit(self, lease: Lease, num_blocks: int) -> None:
        """The first `num_blocks` blocks are filled. Of two that were filled alike one is kept."""
        for at in range(lease.num_committed, num_blocks):
            block = lease.blocks[at]
            self._coming.discard(block.key)
            block.made_with = lease.digest
            known = self._blocks.get(block.key)
            if known is None:
                self._add(block)
            else:
                self._replace(lease, at, known)
        lease.num_committed = max(lease.num_committed, num_blocks)

    def release(self, lease: Lease) -> None:
        """Once. Blocks that were never filled are given back."""
        for block in reversed(lease.blocks[lease.num_committed :]):
            self._coming.discard(block.key)
            self._free.append(block.id)
        for block in reversed(lease.blocks[: lease.num_committed]):
            block.num_pins -= 1
            self._offer(block)
        lease.blocks, lease.num_committed = [], 0

    def evict_idle(self) -> None:
        """Forgets what no lease holds."""
        while self._evictable:
            self._evict()

    def _check_version(self, block: Block, digest: str) -> None:
        if block.made_with != digest:
            raise EngineFailed(
                f"block {block.id} of the prompt cache was made with weights {block.made_with[:16]}…,"
                f" and was found for {digest[:16]}…",
                hint="the cache is emptied; try again",
            )

    def _keys(self, lease: Lease, tokens: Sequence[int]) -> Iterator[BlockKey]:
        """Of the whole blocks after the lease's; it may grow meanwhile."""
        size = self.block_tokens
        for start in range(len(lease.blocks) * size, len(tokens) - size + 1, size):
            before = lease.blocks[-1] if lease.blocks else None
            yield lease.digest, before, tuple(tokens[start : start + size])

    def _take_id(self) -> int | None:
        if not self._free:
            if self._num_taken < self._num_blocks:
                self._num_taken += 1
                return self._num_taken - 1
            if not self._evictable:
                return None
            self._evict()
        return self._free.pop()

    def _evict(self) -> None:
        block, _ = self._evictable.popitem(last=False)
        del self._blocks[block.key]
        self._free.append(block.id)
        before = block.key[1]
        if before is not None:
            before.num_children -= 1
            self._offer(before, is_oldest=True)

    def _add(self, block: Block) -> None:
        self._blocks[block.key] = block
        if block.key[1] is not None:
            block.key[1].num_children += 1

    def _replace(self, lease: Lease, at: int, known: Block) -> None:
        """Those that follow are keyed by the block that is kept."""
        self._free.append(lease.blocks[at].id)
        self._pin(known)
        lease.blocks[at] = known
        if at + 1 < len(lease.blocks):
            follower = lease.blocks[at + 1]
            self._coming.discard(follower.key)
            follower.key = (follower.key[0], known, follower.key[2])
            self._coming.add(follower.key)

    def _pin(self, block: Block) -> None:
        block.num_pins += 1
        self._evictable.pop(block, None)

    def _offer(self, block: Block, *, is_oldest: bool = False) -> None:
        if block.num_pins == 0 and block.num_children == 0:
            self._evictable[block] = None
            self._evictable.move_to_end(block, last=not is_oldest)
