# %% [markdown]
# # Exercises 7: Paged attention
#
# Nine exercises on [chapter 7](../chapters/07_paged_attention.md) and its [lab](../notebooks/07_paged_attention.ipynb):
# three **warm-ups** of five minutes (7.w1 to 7.w3), the **core** (7.0), and five steps **beyond** (7.1 to 7.5,
# optional), which neither chapter nor lab shows in this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# A *block* holds the keys and values of `block_size` tokens; a *table* names a sequence's blocks in order, so that
# position p lies in slot `table[p // block_size] · block_size + p % block_size`. Arguments stay as they are, unless an
# exercise says otherwise.
#
# Without a GPU, exercise 7.5 runs in Triton's interpreter. The variable that turns it on is read when Triton is
# imported: that is why it stands above the imports.

# %%
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from minillm.cache.blocks import OutOfBlocks, chain_hash
from minillm.kernels.common import tl, triton
from minillm.learn import check

# %% [markdown]
# ## Exercise 7.w1: from positions to slots
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: look positions up in a table | 1 of 5 | 5 | Kwon et al., 2023, 4.1 |
#
# Return the slots of `positions`, in their order. By hand first: the table is [5, 1, 0], blocks hold 4 tokens. Where
# are the positions 3, 6 and 8?
#
# A position that no block of the table holds is an IndexError. A negative one, too: it must never be looked up in a
# block at the other end of the table.


# %%
def slots_of(table: Sequence[int], positions: Sequence[int], block_size: int) -> list[int]:
    """The slot of each position"""
    ### BEGIN SOLUTION
    if any(p < 0 for p in positions):
        raise IndexError(f"positions: expected 0 or more, got {min(positions)}")
    return [table[p // block_size] * block_size + p % block_size for p in positions]
    ### END SOLUTION


# %%
check("7.w1", slots_of)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two questions: which entry of the table, and which place within the block? One division answers both.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Position 6 is in entry 6 // 4 = 1, which names block 1, at place 6 % 4 = 2: slot 1 · 4 + 2. Python raises IndexError
# for an entry behind the end by itself, and none for a negative one.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** This line is all that paging asks of whoever reads or writes the cache. It is a division because all blocks
# are equally long; with a block size that is a power of 2 the compiler makes a shift and a mask of it.
#
# The last sentence is no pedantry. A step that computes a position wrongly by one block finds *somebody's* keys: there
# is no address outside of anything, hence no error, and the text is a little off.

# %% [markdown]
# ## Exercise 7.w2: copy on write
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: who is about to write into a block must be alone in it | 1 of 5 | 5 | Kwon et al., 2023, 4.4 |
#
# `references[block]` says how many tables name the block, and `free` is the list of blocks that none names. A request
# is about to write into the block at `index` of its `table`. Make it the only one that names it:
#
# - If it is that already, change nothing and return None.
# - Otherwise take the **last** block of the list `free`, put it into the table, bring the counts up to date, and return
#   `(old, new)`: what the GPU must copy before the write.
# - If no block is free, raise `OutOfBlocks` and change nothing.
#
# By hand: A comes with 6 tokens, in blocks of 4; B is a fork of A; B writes, then A writes, then A is done. Which
# counts do the blocks have after each of these?


# %%
def make_private(table: list[int], index: int, references: list[int], free: list[int]) -> tuple[int, int] | None:
    """Changes table, references and free in place -> (from, to) of the copy, or None"""
    ### BEGIN SOLUTION
    old = table[index]
    if references[old] == 1:
        return None
    if not free:
        raise OutOfBlocks("a copy is wanted and no block is free")
    new = free.pop()
    references[old] -= 1
    references[new] = 1
    table[index] = new
    return old, new
    ### END SOLUTION


# %%
check("7.w2", make_private)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# By hand, with B's copy in block 2: [1, 1, 0], then [2, 2, 0], then [2, 1, 1], then the same (A is alone by now), then
# [1, 0, 1].
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Look at the count before you take anything. Three things change: the old block's count, the new one's, and the entry.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The old block never becomes free here: its count was 2 or more, and goes down by one. The last of n writers
# finds itself alone and copies nothing, so a fork into n costs n - 1 copies.
#
# "Change nothing" on an error matters because the scheduler catches it, preempts somebody, and tries again.

# %% [markdown]
# ## Exercise 7.w3: whose token is this?
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: the owner of each token of a batch, without a loop | 1 of 5 | 5 | – |
#
# A step's tokens lie one after another: `counts[i]` of sequence i. Return, for each of `size` places, the number of the
# sequence that owns it, as int64. Places behind the last token get `len(counts)`. A sequence may have no token.
#
# By hand: counts [2, 0, 3], so the running total is [2, 2, 5]. What is
# `torch.searchsorted(torch.tensor([2, 2, 5]), torch.arange(7), right=True)`, and what without `right=True`?
#
# Read no value on the way: exercise 7.2 is built on this, on a GPU. The check also runs your code on tensors that have
# shapes and no values (device "meta"); new tensors go to the device of `counts`.


# %%
def owners(counts: torch.Tensor, size: int) -> torch.Tensor:
    """counts [B] int64 -> [size] int64"""
    ### BEGIN SOLUTION
    return torch.searchsorted(counts.cumsum(0), torch.arange(size, device=counts.device), right=True)
    ### END SOLUTION


# %%
check("7.w3", owners)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Place n belongs to the first sequence whose running total is *larger* than n. Larger, not larger or equal: with a
# total of 2, the places are 0 and 1.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `right=True` gives the first index whose value is larger than what is searched. `counts.cumsum(0)` has the totals.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Without `right=True` place 2 goes to sequence 0, which has two tokens: 0 and 1. With it, sequence 1 (no
# tokens) owns nothing, as its total is no larger than the one before.
#
# `torch.repeat_interleave(torch.arange(len(counts)), counts)` says the same from the other side, but its output has as
# many entries as there are tokens: the CPU must wait for the GPU to know how many (exercise 7.2).

# %% [markdown]
# ## Exercise 7.0: a pool with a prefix cache
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: allocate, release, publish and find blocks, as the package does | 3 of 5 | 30 | Kwon et al., 2023, 4.3 |
#
# Write the pool, without tensors. `num_blocks` blocks, numbered from 0, wait in a **queue**, in this order at first. A
# full block may have a **name**, its block hash, by which it is found again.
#
# - `allocate()` takes the block at the queue's front; no table named it, now one does. If it has a name, nobody may
#   find it by that name any more: it is about to be written. Raises `OutOfBlocks` if the queue is empty.
# - `publish(block, name)` lets the block be found. A name that a block has already stays with that block, and a block
#   that has a name keeps it: in both cases nothing happens.
# - `match_prefix(token_ids)` returns the blocks, in order, that hold the beginning of a prompt. The name of its first
#   full block is `chain_hash(b"", tokens)` over that block's tokens; of each later one `chain_hash(name of the block
#   before, tokens)`. Stop at the first name that no block has. **At least one token is left to compute**, even if all
#   full blocks are there. Each block that is returned has one table more that names it; if it stood in the queue, it
#   does no longer.
# - `release(block)`: one table less names it. With the last one it goes into the queue and *keeps its name*: to the
#   end, if it has one; to the front, if it has none, as nothing in it is worth keeping. A block that is in the queue
#   already is a ValueError, and nothing changes.
# - `num_free`: how many blocks stand in the queue.
#
# The check does the same random operations with the package's `BlockPool`: every block and every count must be equal.


# %%
class PrefixPool:
    """Blocks with reference counts and names."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        ### BEGIN SOLUTION
        self.references = [0] * num_blocks
        self.queue = OrderedDict.fromkeys(range(num_blocks))
        self.block_of: dict[bytes, int] = {}
        self.name_of: dict[int, bytes] = {}
        ### END SOLUTION

    @property
    def num_free(self) -> int:
        """Blocks that no table names."""
        ### BEGIN SOLUTION
        return len(self.queue)
        ### END SOLUTION

    def allocate(self) -> int:
        """The block that has been free for longest. Raises OutOfBlocks."""
        ### BEGIN SOLUTION
        if not self.queue:
            raise OutOfBlocks("all blocks are in use")
        block, _ = self.queue.popitem(last=False)
        if block in self.name_of:
            del self.block_of[self.name_of.pop(block)]
        self.references[block] = 1
        return block
        ### END SOLUTION

    def publish(self, block: int, name: bytes) -> None:
        """Let the block be found by its name."""
        ### BEGIN SOLUTION
        if name not in self.block_of and block not in self.name_of:
            self.block_of[name], self.name_of[block] = block, name
        ### END SOLUTION

    def match_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """The blocks that hold the beginning of the prompt, each with one more table that names it."""
        ### BEGIN SOLUTION
        size, name, found = self.block_size, b"", []
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            name = chain_hash(name, token_ids[start : start + size])
            if name not in self.block_of:
                break
            found.append(self.block_of[name])
            self.references[found[-1]] += 1
            self.queue.pop(found[-1], None)
        return found
        ### END SOLUTION

    def release(self, block: int) -> None:
        """One table less names the block. Raises ValueError."""
        ### BEGIN SOLUTION
        if self.references[block] == 0:
            raise ValueError(f"block {block} is free already")
        self.references[block] -= 1
        if self.references[block] == 0:
            self.queue[block] = None
            self.queue.move_to_end(block, last=block in self.name_of)
        ### END SOLUTION


# %%
check("7.0", PrefixPool)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two dictionaries for one relation: name to block, and block to name; whoever ends it must end both. The queue needs
# an order, a quick look at its front, and a way to take a block out of its middle: an `OrderedDict` whose values do not
# matter.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `OrderedDict.popitem(last=False)` takes the front; `move_to_end(block, last=False)` puts something there.
# `(len(token_ids) - 1) // block_size` blocks may be found at most: what is that for 8 tokens in blocks of 4, and for 9?
# </details>

# %% [markdown] tags=["solution"]
# **Why.** One structure is the list of free blocks *and* the queue of the cache: a free block is a cached block until
# somebody needs memory. So the cache costs no memory that anybody else wants, and there is no setting for its size.
#
# A table is released from its last block to its first. Then ends stand before beginnings in the queue and go first, and
# a chain loses its tail, not its head: a block whose beginning is gone would never be found.
#
# The package's pool has the same operations with `share` of its own (a fork uses it), and `match_prefix` stands in the
# table, which knows its root. vLLM's free queue is a linked list, for the same three wishes.

# %% [markdown]
# ## Exercise 7.1: a table that forgets (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: blocks for a model whose tokens see the last `window` tokens only | 3 of 5 | 25 | Jiang et al., 2023 |
#
# With a sliding window the token at position p sees the positions p - window + 1 ... p. A block that lies behind every
# window to come is dead: give it back while the sequence goes on. Write the table.
#
# `extend(count)` is called before each step, which writes `count` tokens at the next positions and lets each of them
# attend; all their keys and all that they see must be in blocks during the step. So it
#
# 1. gives back what the *first* of the new tokens does not see, and no later one does. Its entry becomes -1; others
#    keep their places;
# 2. takes the blocks that the new tokens need and the table lacks. In this order: the pool may be so tight that the new
#    block is the old one.
#
# `count` is 1 or more. `allocate()` returns a block, 0 or more, or raises `OutOfBlocks`. When it raises, `extend` gives
# back what it took *in this call*, passes that very error on, and can be called again later; what was dead stays given
# back. `free()` gives back everything that is still held, each block once; the table is then as a new one, for another
# sequence. `num_tokens` counts the tokens so far, and is 0 after `free()`.


# %%
class WindowTable:
    """The blocks of one sequence; -1 stands for one that was given back."""

    def __init__(
        self, block_size: int, window: int, allocate: Callable[[], int], release: Callable[[int], None]
    ) -> None:
        self.block_size, self.window = block_size, window
        self.allocate, self.release = allocate, release
        self.blocks: list[int] = []
        self.num_tokens = 0

    def extend(self, count: int) -> None:
        """Make room for the next `count` tokens and give back what none of them sees. Raises OutOfBlocks."""
        ### BEGIN SOLUTION
        seen = max(0, self.num_tokens - self.window + 1)  # the first position that the first new token sees
        for index in range(seen // self.block_size - 1, -1, -1):
            if self.blocks[index] < 0:
                break  # all before it went earlier
            self.release(self.blocks[index])
            self.blocks[index] = -1
        before = len(self.blocks)
        try:
            while len(self.blocks) * self.block_size < self.num_tokens + count:
                self.blocks.append(self.allocate())
        except OutOfBlocks:
            while len(self.blocks) > before:
                self.release(self.blocks.pop())
            raise
        self.num_tokens += count
        ### END SOLUTION

    def free(self) -> None:
        """Give back all blocks that are still held."""
        ### BEGIN SOLUTION
        for block in reversed(self.blocks):
            if block >= 0:
                self.release(block)
        self.blocks, self.num_tokens = [], 0
        ### END SOLUTION


# %%
check("7.1", WindowTable)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Which is the first position that the first new token sees? A block is dead if its *last* position lies before that
# one. Later tokens see no more of the past than the first one.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The first new token stands at `num_tokens`. Whole blocks before the position `num_tokens - window + 1` are dead, as
# many as that position divided by the block size, rounded down. Go from there to the left until a -1, so that a step
# does not walk over the whole past. Count the table's length before you allocate, and cut back to it on an error.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** With a window of W tokens and blocks of C slots one token a step holds at most $\lceil (W-1) / C \rceil + 1$
# blocks, whatever the length of the text: the window touches one block more than it fills when it is not aligned.
# Entries must keep their places, because position p is looked up at `p // block_size`; the kernel of exercise 7.5 never
# reads the -1.
#
# A chunk of a prompt needs more: all of its own tokens are written in the step, and its first token still sees a whole
# window back. Only the *next* step may forget. That is why the first new token decides, not the last.
#
# The other way is a ring: a fixed table of $\lceil W / C \rceil + 1$ blocks, reused in turn (chapter 6's rolling cache
# in blocks). It never asks the pool again, but it cannot share a prefix: published blocks would be overwritten.
# Models that mix layers with and without a window need a table for each kind (vLLM's hybrid cache manager).

# %% [markdown]
# ## Exercise 7.2: slots for a graph, on several GPUs (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: positions to slots for a whole batch, in shapes that never change | 4 of 5 | 25 | Kwon et al., 2023, 4.3 |
#
# A step brings `counts[i]` new tokens of sequence i, at the positions `starts[i]`, `starts[i] + 1`, ... The tokens of
# all sequences lie one after another. Return the slot of each, as int64.
#
# Two steps beyond the lab. First, a CUDA graph replays fixed shapes: the result has `size` entries, at least as many as
# there are tokens; the rest is padding and gets -1 (write nowhere). Second, one context may lie on several GPUs: block
# number b of a sequence (its b-th, counted from 0) is held by GPU `b % ranks`, and each GPU has a table of its own
# blocks alone. A token that another GPU holds gets -1 as well. With `ranks = 1` it is the ordinary mapping.
#
# - `tables [B, width]` int32 is this GPU's; entries that are not used hold anything. Tensors need not be contiguous.
# - A sequence may have no new token. There is at least one sequence.
# - Nothing may wait for the GPU: no `.item()`, no `.tolist()`, no operation whose output shape depends on *values*
#   (boolean indexing, `nonzero`, `repeat_interleave`). A loop over the sequences is allowed, if it reads no value (it
#   is slow: some ten launches each). New tensors go to the device of `tables`. The check also runs your code on tensors
#   that have shapes and no values (device "meta").
# - Multiply in int64: the check has blocks whose slots pass 2³¹.


# %%
def slot_mapping(
    tables: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor, size: int, block_size: int,
    rank: int = 0, ranks: int = 1,
) -> torch.Tensor:  # fmt: skip
    """tables [B, width] int32, starts [B] int64, counts [B] int64 -> slots [size] int64, -1: nowhere"""
    ### BEGIN SOLUTION
    ends = counts.cumsum(0)  # [B]
    token = torch.arange(size, device=tables.device)  # [size]
    owner = torch.searchsorted(ends, token, right=True)  # the first sequence that ends after the token
    inside = owner < len(counts)
    owner = owner.clamp(max=len(counts) - 1)
    position = starts[owner] + token - (ends - counts)[owner]
    number = position // block_size  # of the block, in the sequence
    entry = (number // ranks).clamp(min=0, max=tables.shape[1] - 1)
    slots = tables[owner, entry].long() * block_size + position % block_size
    return torch.where(inside & (number % ranks == rank), slots, -1)
    ### END SOLUTION


# %%
check("7.2", slot_mapping)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Work from the output: entry n of `size` belongs to the first sequence whose running total of counts is larger than n.
# `torch.searchsorted` finds it for all n at once. Entries past the last total are padding.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# With the owner of each entry, everything is arithmetic and indexing: its position, the number of its block in the
# sequence, and from that the rank (`%`) and the place in that rank's table (`//`). Padding has indices out of range:
# clamp them, compute nonsense, and replace it by -1 with `torch.where`. Make the table's numbers int64 before you
# multiply.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** `repeat_interleave(counts)` says it more directly, but its output has as many entries as the counts sum to:
# torch must wait for the GPU to know the shape, and a graph cannot be captured. Searching from the output side has a
# fixed shape and does a little useless work for the padding. The package does the same on the GPU, in one kernel
# (`step_inputs`): each token's program searches the sequence that owns it.
#
# Interleaving blocks over GPUs (decode context parallelism) lets several GPUs share the reading of one long context
# when there are more GPUs than key/value heads. Each computes attention over the keys that it holds, and the results
# are merged by their log-sum-exp: exercise 5.4.

# %% [markdown]
# ## Exercise 7.3: names that tell pictures and tenants apart (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: a prefix hash that covers all that a block depends on, and nothing else | 3 of 5 | 20 | – |
#
# Tokens do not tell everything. A picture enters a prompt as a row of placeholder tokens, the same for every picture;
# its features replace their embeddings. And two tenants must not find each other's blocks, since the time of an answer
# tells whether a prompt was cached. Give the name (the block hash) of every *full* block of a prompt, so that two names
# are equal exactly if all of this is equal:
#
# - the tokens from the start of the prompt to the end of the block;
# - the `salt` of the tenant, any text;
# - the pictures that reach into this part: where each starts, and its digest. `images` holds `(start, length, digest)`
#   in any order; the placeholders stand at start ... start + length - 1. A picture may begin in one block and end in a
#   later one. How long it is does not count by itself. Pictures behind the block's end have no influence: that is what
#   makes a prefix.
#
# Names are `bytes`, at least 16, of a cryptographic hash (not MD5 or SHA-1; as bytes or in hexadecimal), and the same
# in every process: Python's `hash` and `id` are not. Token ids are below 2⁶³, in a list or in a tuple: the same names.
# Digests may be of any length, and may be any bytes: what you hash must tell where one field ends and the next begins.

# %%
Image = tuple[int, int, bytes]


def block_names(token_ids: Sequence[int], block_size: int, salt: str = "", images: Sequence[Image] = ()) -> list[bytes]:
    """The names of the full blocks, in order"""
    ### BEGIN SOLUTION
    import hashlib
    from array import array

    parent, names = hashlib.sha256(salt.encode()).digest(), []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        stop = start + block_size
        key = hashlib.sha256(parent + array("q", token_ids[start:stop]).tobytes())
        for first, _, digest in sorted(images):
            if start <= first < stop:  # of those that began before, the chain knows
                key.update(array("q", [first - start, len(digest)]).tobytes() + digest)
        parent = key.digest()
        names.append(parent)
    return names
    ### END SOLUTION


# %%
check("7.3", block_names)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A chain: each name is a hash over the name before it, and over what is new in this block. Where does the salt enter,
# so that all blocks depend on it? Which pictures are new to a block, and which of them has the chain not seen?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Fields of fixed width need no separator: the parent's digest, `block_size` tokens of 8 bytes each
# (`array("q", ...).tobytes()`). A digest of any length does: write its length before it. Its place in the block matters
# too: the same picture one token later is another prompt. Sort the pictures, so that their order cannot matter.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The keys and values of a token depend on its embedding and on everything before it. Whatever enters that
# computation must enter the name: tokens, pictures, adapters, the tenant. Whatever does not enter it must stay out:
# a name that depends on a later picture would never be found by a prompt that shares only the beginning.
#
# Concatenating fields of free length without their lengths maps different inputs to the same bytes
# (`"ab" + "c" = "a" + "bc"`), and then no hash function helps. Python's `hash` is not for this: it is keyed per process
# (so two workers disagree), 64 bits wide, and not made to resist somebody who looks for collisions; vLLM moved its
# default to SHA-256 for this reason.
#
# The package's chain begins at a root over the salt, the weights and the cache's dtype (`Engine._root`): whatever is
# the same for the whole prompt is hashed once.

# %% [markdown]
# ## Exercise 7.4: what a radix tree throws away (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: evict leaves, the least recently used first, until there is room | 3 of 5 | 20 | Zheng et al., 2024, 3 |
#
# In a radix tree a node holds the tokens of one edge, and all nodes above it are its prefix. A node without its
# parents is useless: it may never be thrown away before its children. So only leaves go, and a parent becomes a leaf
# when its last child is gone.
#
# Write `evict`: choose nodes until at least `wanted` tokens are free, and return their ids as a list, in the order in
# which they go. At each moment the leaf with the smallest `last_used` of all leaves goes, if no request reads it
# (`references` is 0). The root, whose `parent` is None, stays. When there is not enough, return all that can go. Choose
# no more nodes than needed, and leave the tree as it is: the caller removes them.
#
# Times are all different; do not rely on a parent being younger or older than its children.


# %%
@dataclass
class Node:
    """One node of the tree."""

    parent: int | None
    tokens: int
    last_used: float
    references: int = 0


def evict(nodes: dict[int, Node], wanted: int) -> list[int]:
    """nodes: id -> Node -> the ids to throw away, in order"""
    ### BEGIN SOLUTION
    import heapq
    from collections import Counter

    children = Counter(node.parent for node in nodes.values())

    def goes(i: int) -> bool:
        return nodes[i].parent is not None and not children[i] and not nodes[i].references

    leaves, chosen, freed = [(nodes[i].last_used, i) for i in nodes if goes(i)], [], 0
    heapq.heapify(leaves)
    while leaves and freed < wanted:
        _, i = heapq.heappop(leaves)
        chosen.append(i)
        freed += nodes[i].tokens
        parent = nodes[i].parent
        children[parent] -= 1
        if goes(parent):
            heapq.heappush(leaves, (nodes[parent].last_used, parent))
    return chosen
    ### END SOLUTION


# %%
check("7.4", evict)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Count each node's children once. Then a node that goes takes one from its parent's count, and a count of 0 makes a
# new leaf, which competes with the others at once.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A heap of `(last_used, id)` gives the oldest leaf, and takes a new one, in logarithmic time. A node that a request
# reads never enters it, and so none of its ancestors ever becomes a leaf. Stop as soon as enough tokens are free.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Throwing away an inner node would leave its children in memory, where no lookup reaches them: a lookup walks
# from the root. The hash chain has the same danger (a block whose parent is gone is not found) and the package meets
# it with an order instead of a rule: a table gives its last block back first, so that ends are older than beginnings.
# A request that shares only the beginning makes that younger still, so blocks of a chain leave from the end.
#
# SGLang keeps reference counts on all ancestors of a node in use. With the leaf rule a count on the last node is
# enough: its ancestors have a child. A scan over all nodes for each victim is right too, and quadratic.

# %% [markdown]
# ## Exercise 7.5: decoding through a table that forgot (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: a paged decode kernel with a sliding window, in Triton | 5 of 5 | 40 | Kwon et al., 2023, 4.1 |
#
# Each sequence brings one query, at its last position. It sees the last `window` of its `context_lens[i]` tokens,
# itself included. Query heads are grouped: heads `g · GROUP` ... `(g + 1) · GROUP - 1` share key/value head g.
#
# Program (i, g) does sequence i and key/value head g: all GROUP query heads at once, as the first rows of a block of
# ROWS rows (`tl.dot` needs at least 16; GROUP may be larger), and one cache block in each round of the loop. There are
# no other programs: each key is read once. Blocks behind the window were given back (exercise 7.1): their entries are
# -1, and reading through them reads what does not belong to you. They get no round of the loop. In the first and last
# visited block some slots do not count either, and may hold NaN. Nothing is read outside of the tensors: rows past
# GROUP need a mask. A sequence with a context of 0 gives 0.
#
# q and the output are `[B, H, D]`, caches `[slots, H_KV, D]`, all contiguous, fp32 or fp16; `tables [B, width]` (rows
# may lie further apart than that) and `context_lens [B]` are int32. D and BLOCK_SIZE are powers of two of at least 16.
# The running state is fp32, `tl.dot` gets `input_precision="ieee"`. Compute offsets in int64: numbers of a large pool
# pass 2³¹ (the check cannot see this). The launch is written, but for its `grid`.


# %%
@triton.jit
def window_decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, context_ptr, stride_table, window, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The GROUP query heads of key/value head program_id(1) of sequence program_id(0)"""
    ### BEGIN SOLUTION
    sequence, head_kv = tl.program_id(0), tl.program_id(1)
    row, offs_d, offs_n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK_SIZE)
    offs_q = ((sequence * H_KV + head_kv) * GROUP + row[:, None]) * D + offs_d[None, :]  # [ROWS, D]
    used = row[:, None] < GROUP
    q = tl.load(q_ptr + offs_q, mask=used, other=0.0)
    context = tl.load(context_ptr + sequence)
    first = tl.maximum(context - window, 0)
    row_max = tl.full((ROWS,), -1.0e30, tl.float32)
    row_sum, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for index in range(first // BLOCK_SIZE, tl.cdiv(context, BLOCK_SIZE)):
        block = tl.load(table_ptr + sequence * stride_table + index).to(tl.int64)
        position = index * BLOCK_SIZE + offs_n
        seen = (position >= first) & (position < context)  # [BLOCK_SIZE]
        offs_kv = ((block * BLOCK_SIZE + offs_n) * H_KV + head_kv)[:, None] * D + offs_d[None, :]
        k = tl.load(k_ptr + offs_kv, mask=seen[:, None], other=0.0)  # [BLOCK_SIZE, D]
        v = tl.load(v_ptr + offs_kv, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, BLOCK_SIZE]
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - new_max[:, None]), tl.exp(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        row_max = new_max
    out = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    tl.store(out_ptr + offs_q, out.to(out_ptr.dtype.element_ty), mask=used)
    ### END SOLUTION


def window_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor, context_lens: torch.Tensor,
    window: int, block_size: int,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel.  q [B, H, D], caches [slots, H_KV, D] -> [B, H, D] in q's dtype"""
    out, kv_heads, group = torch.empty_like(q), k_cache.shape[1], q.shape[1] // k_cache.shape[1]
    ### BEGIN SOLUTION
    grid = (len(q), kv_heads)
    ### END SOLUTION
    window_decode_kernel[grid](
        q, k_cache, v_cache, out, tables, context_lens, tables.stride(0), window, q.shape[2] ** -0.5, H_KV=kv_heads,
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), D=q.shape[2], BLOCK_SIZE=block_size,
    )  # fmt: skip
    return out


# %%
check("7.5", window_decode)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Exercise 5.5's loop with another address for K and V: one block of the table a round. Which index is the first that
# the window touches, and which the last? Between them no entry is -1.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The query stands at `context - 1`, so it sees `first = max(context - window, 0)` and later: blocks from
# `first // BLOCK_SIZE` to the last one that `context` reaches into. Slot n of block b starts at
# `((b * BLOCK_SIZE + n) * H_KV + head_kv) * D`. One mask over the block's slots serves K, V and the scores: V too,
# since 0 · NaN is NaN.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The table costs one load of 4 bytes a block, against `2 · BLOCK_SIZE · D` numbers of keys and values for this
# head: nothing. Packing the group into the rows of one product reads each key once for all heads that share it; one
# program for each query head would read it GROUP times, and memory is the limit. The rows between GROUP and ROWS are
# arithmetic for nothing, and it does not matter: the tensor cores wait for memory anyway.
#
# What the package's kernel has beyond this: tiles of several blocks (so a small block size does not make small
# products), several queries a sequence, splits of the context with a second kernel that joins them, 2^x.
