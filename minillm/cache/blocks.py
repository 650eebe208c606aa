"""Which block of the cache belongs to whom: a pool with reference counts, a prefix cache, and tables of blocks.

No tensors here, only numbers of blocks. A block holds the keys and values of `block_size` tokens, in all layers. A
request's tokens lie in the blocks of its table, in order; the last block may be partly filled. Three ideas share
memory:

- **Reference counts.** A block may stand in several tables. It is free when none names it any more.
- **Prefix cache.** A full block is published under a hash of its tokens and of all tokens before it (the hash of the
  block before is part of it: a chain, whose first link, the root, stands for all else that decides the content: the
  weights, the adapter, the cache's dtype, whose tenant it is). A new request whose prompt starts alike takes the block
  instead of computing it. A free block keeps its content and its hash until it is handed out anew, the least recently
  used first.
- **Copy on write.** Who wants to write into a block that others read gets a copy of it first.

Everything is O(1) a block. Sources: Kwon et al., 2023 (blocks, tables, copy on write); the hash chain is vLLM's.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["BlockPool", "BlockTable", "OutOfBlocks", "chain_hash"]


class OutOfBlocks(Exception):
    """No block is free."""


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block: 16 bytes of BLAKE2b over its parent's name and its own tokens.

    Cryptographic, because a collision would answer a request with another one's context.
    """
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, all free at the start."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks, block_size: expected 1 or more, got {num_blocks} and {block_size}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self._hash_of: dict[int, bytes] = {}  # both directions of one relation: published block <-> hash
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no table names; some of them still hold a published prefix."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that some table names."""
        return self.num_blocks - len(self._free)

    def allocate(self) -> int:
        """Take the block that has been free for longest; what it held is forgotten. Raises OutOfBlocks."""
        if not self._free:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are in use")
        block, _ = self._free.popitem(last=False)
        self.forget(block)
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more table names the block; a free one is free no longer."""
        if self.references[block] == 0:
            del self._free[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One table less names the block. With the last one it becomes free, and keeps its content until reused."""
        if self.references[block] < 1:
            raise ValueError(f"block {block} is free already")
        self.references[block] -= 1
        if self.references[block] == 0:
            self._free[block] = None
            if block not in self._hash_of:
                self._free.move_to_end(block, last=False)  # nothing worth keeping in it: the next to be taken

    def publish(self, block: int, name: bytes) -> None:
        """Let others find the block, which is full and computed, by its hash. The first of two equal ones stays."""
        if self.enable_prefix_caching and name not in self._block_of and block not in self._hash_of:
            self._block_of[name], self._hash_of[block] = block, name

    def is_private(self, block: int) -> bool:
        """Whether one table alone names the block, and no hash."""
        return self.references[block] == 1 and block not in self._hash_of

    def forget(self, block: int) -> None:
        """The block is about to be written: its hash, if it has one, would lie."""
        if (old := self._hash_of.pop(block, None)) is not None:
            del self._block_of[old]

    def find(self, name: bytes) -> int | None:
        """The published block of this hash, used or free."""
        return self._block_of.get(name)


@dataclass
class BlockTable:
    """The blocks of one request, in the order of its tokens. `hashes` names those that are full and published.

    `root` is what the first block's name is chained to: tables of different roots never share a block.
    `synced` is for whoever keeps a copy of the table: so many entries have not changed since it was last set.
    """

    pool: BlockPool
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    synced: int = 0
    root: bytes = b""

    def match_prefix(self, token_ids: Sequence[int]) -> int:
        """Fill an empty table with published blocks that hold the start of `token_ids` -> how many tokens they hold.

        At least one token is left to compute, even when all are known: its output is the next token.
        """
        if self.blocks:
            raise ValueError("match_prefix: expected an empty table")
        size, parent = self.pool.block_size, self.root
        if not self.pool.enable_prefix_caching:
            return 0
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            parent = chain_hash(parent, token_ids[start : start + size])
            if (block := self.pool.find(parent)) is None:
                break
            self.pool.share(block)
            self.blocks.append(block)
            self.hashes.append(parent)
        return len(self.blocks) * size

    def missing(self, start: int, stop: int) -> int:
        """How many blocks writing the tokens start ... stop - 1 takes from the pool, copies included."""
        size = self.pool.block_size
        shared = sum(self.pool.references[b] > 1 for b in self.blocks[start // size : -(-stop // size)])
        return max(0, -(-stop // size) - len(self.blocks)) + shared

    def has_room(self, position: int) -> bool:
        """Whether the token at `position` goes into a block of this table alone and does not fill it: nothing to do."""
        index, pool = position // self.pool.block_size, self.pool
        if not len(self.hashes) <= index < len(self.blocks) or (position + 1) % pool.block_size == 0:
            return False
        block = self.blocks[index]
        return pool.references[block] == 1 and block not in pool._hash_of

    def extend(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Make room for the tokens start ... stop - 1, to be written into blocks of this table alone.

        Returns the copies to be made first, (from block, to block). Raises OutOfBlocks and leaves everything as it was.
        """
        size, pool = self.pool.block_size, self.pool
        first = start // size
        mine = len(self.hashes) <= first < len(self.blocks) and pool.is_private(self.blocks[first])
        if mine and stop <= (first + 1) * size:
            return []  # the common case: one more token in a block of its own
        if self.missing(start, stop) > pool.num_free:
            raise OutOfBlocks(f"{self.missing(start, stop)} blocks wanted, {pool.num_free} free")
        copies = []
        del self.hashes[first:]  # what is written is published anew
        for index in range(first, min(len(self.blocks), -(-stop // size))):
            old = self.blocks[index]
            if pool.references[old] > 1:
                self.blocks[index] = pool.allocate()
                copies.append((old, self.blocks[index]))
                pool.release(old)
                self.synced = min(self.synced, index)
            else:
                pool.forget(old)
        while len(self.blocks) * size < stop:
            self.blocks.append(pool.allocate())
        return copies

    def publish(self, token_ids: Sequence[int], num_computed: int) -> None:
        """Name the blocks that have become full, of the first `num_computed` tokens, which are known.

        They are computed, or will be by the step that is being scheduled: a layer stores all keys and values of a step
        before anybody reads them there, so even a request of the same step may read them.
        """
        if not self.pool.enable_prefix_caching:
            return
        size = self.pool.block_size
        for index in range(len(self.hashes), min(num_computed, len(token_ids)) // size):
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(chain_hash(parent, token_ids[index * size : (index + 1) * size]))
            self.pool.publish(self.blocks[index], self.hashes[-1])

    def unpublish(self, first: int) -> None:
        """Take back the names of the blocks from index `first` on: what they hold is not what was promised."""
        for block, name in zip(self.blocks[first:], self.hashes[first:], strict=False):
            if self.pool.find(name) == block:
                self.pool.forget(block)
        del self.hashes[first:]

    def fork(self, num_tokens: int) -> "BlockTable":
        """A table that shares the blocks of the first `num_tokens` tokens; who writes first gets copies."""
        count = -(-num_tokens // self.pool.block_size)
        for block in self.blocks[:count]:
            self.pool.share(block)
        hashes = self.hashes[: num_tokens // self.pool.block_size]
        return BlockTable(self.pool, self.blocks[:count], hashes, root=self.root)

    def free(self) -> None:
        """Give all blocks back, the last first: ends of prompts are found again less often than their beginnings."""
        for block in reversed(self.blocks):
            self.pool.release(block)
        self.blocks, self.hashes, self.synced = [], [], 0
