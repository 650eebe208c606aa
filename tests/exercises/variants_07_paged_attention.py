"""Wrong and alternative implementations for the exercises of chapter 7: they keep the checks honest."""

import hashlib
import os
import zlib
from array import array
from collections import OrderedDict

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from minillm.cache.blocks import BlockPool, BlockTable, OutOfBlocks, chain_hash
from minillm.kernels.common import tl, triton
from minillm.learn.testing import alternative, wrong

# ---- 7.w1


@wrong("7.w1", "a negative position is looked up at the other end of the table")
def slots_of(table, positions, block_size):
    return [table[p // block_size] * block_size + p % block_size for p in positions]


@wrong("7.w1", "ignores the table")
def slots_of(table, positions, block_size):
    if not all(0 <= p < len(table) * block_size for p in positions):
        raise IndexError
    return list(positions)


@wrong("7.w1", "forgets the place within the block")
def slots_of(table, positions, block_size):
    if min(positions, default=0) < 0:
        raise IndexError
    return [table[p // block_size] * block_size for p in positions]


@wrong("7.w1", "quotient and remainder exchanged")
def slots_of(table, positions, block_size):
    if min(positions, default=0) < 0:
        raise IndexError
    return [table[p % block_size] * block_size + p // block_size for p in positions]


@wrong("7.w1", "a position behind the table is left out")
def slots_of(table, positions, block_size):
    if min(positions, default=0) < 0:
        raise IndexError
    known = [p for p in positions if p < len(table) * block_size]
    return [table[p // block_size] * block_size + p % block_size for p in known]


@wrong("7.w1", "sorts the positions")
def slots_of(table, positions, block_size):
    if min(positions, default=0) < 0:
        raise IndexError
    return [table[p // block_size] * block_size + p % block_size for p in sorted(positions)]


@wrong("7.w1", "blocks of 4, whatever the block size")
def slots_of(table, positions, block_size):
    if min(positions, default=0) < 0:
        raise IndexError
    return [table[p // 4] * 4 + p % 4 for p in positions]


@wrong("7.w1", "changes the caller's positions")
def slots_of(table, positions, block_size):
    if min(positions, default=0) < 0:
        raise IndexError
    for i, p in enumerate(positions):
        positions[i] = table[p // block_size] * block_size + p % block_size
    return list(positions)


@alternative("7.w1", "all slots first")
def slots_of(table, positions, block_size):
    slots = [block * block_size + place for block in table for place in range(block_size)]
    if any(not 0 <= p < len(slots) for p in positions):
        raise IndexError
    return [slots[p] for p in positions]


# ---- 7.w2


def private(table, index, references, free, mistake=""):
    old = table[index]
    if references[old] == 1 and mistake != "always":
        return None
    if mistake == "takes first":
        references[old] -= 1
    if not free and mistake == "returns None":
        return None
    if not free:
        raise OutOfBlocks
    new = free.pop(0 if mistake == "first" else -1)
    if mistake not in ("old count", "takes first"):
        references[old] -= 1
    if mistake != "new count":
        references[new] = references[old] + 1 if mistake == "copies the count" else 1
    if mistake == "frees":
        free.append(old)
    if mistake != "table":
        table[index] = new
    return (new, old) if mistake == "turned" else (old, new)


def private_with(what):
    return lambda table, index, references, free: private(table, index, references, free, what)


for what, why in (
    ("always", "copies even if the table is alone"),
    ("takes first", "takes the old count down before it knows that a block is free"),
    ("returns None", "says that no copy is needed if no block is free"),
    ("first", "takes the first of the free blocks"),
    ("old count", "leaves the old block's count"),
    ("new count", "leaves the new block's count at 0"),
    ("copies the count", "gives the copy the old block's count"),
    ("frees", "puts the old block, which others read, among the free ones"),
    ("table", "leaves the table"),
    ("turned", "from and to exchanged"),
):
    wrong("7.w2", why)(private_with(what))


@wrong("7.w2", "takes block 0 for no block")
def make_private(table, index, references, free):
    old = table[index]
    if references[old] == 1:
        return None
    new = free[-1] if free else None
    if not new:
        raise OutOfBlocks
    free.pop()
    references[old], references[new], table[index] = references[old] - 1, 1, new
    return old, new


@alternative("7.w2", "an IndexError turned into OutOfBlocks")
def make_private(table, index, references, free):
    if references[table[index]] < 2:
        return None
    try:
        new = free.pop()
    except IndexError:
        raise OutOfBlocks from None
    old, table[index] = table[index], new
    references[old], references[new] = references[old] - 1, 1
    return old, new


# ---- 7.w3


@wrong("7.w3", "without right=True: a place on the border goes to the sequence before")
def owners(counts, size):
    return torch.searchsorted(counts.cumsum(0), torch.arange(size, device=counts.device))


@wrong("7.w3", "searches where sequences begin, not where they end")
def owners(counts, size):
    return torch.searchsorted(counts.cumsum(0) - counts, torch.arange(size, device=counts.device), right=True)


@wrong("7.w3", "places behind the last token go to the last sequence")
def owners(counts, size):
    found = torch.searchsorted(counts.cumsum(0), torch.arange(size, device=counts.device), right=True)
    return found.clamp(max=len(counts) - 1)


@wrong("7.w3", "int32")
def owners(counts, size):
    at = torch.arange(size, device=counts.device)
    return torch.searchsorted(counts.cumsum(0), at, right=True, out_int32=True)


@wrong("7.w3", "repeat_interleave: how many entries there are depends on values")
def owners(counts, size):
    found = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.cat((found, torch.full((size - len(found),), len(counts))))


@wrong("7.w3", "a loop that reads the counts")
def owners(counts, size):
    found = [i for i, n in enumerate(counts.tolist()) for _ in range(n)]
    return torch.tensor(found + [len(counts)] * (size - len(found)))


@wrong("7.w3", "new tensors on the CPU")
def owners(counts, size):
    return torch.searchsorted(counts.cumsum(0), torch.arange(size), right=True)


@wrong("7.w3", "changes the counts")
def owners(counts, size):
    return torch.searchsorted(counts.cumsum_(0), torch.arange(size, device=counts.device), right=True)


@wrong("7.w3", "refuses a batch of nobody")
def owners(counts, size):
    if len(counts) == 0:
        raise ValueError
    return torch.searchsorted(counts.cumsum(0), torch.arange(size, device=counts.device), right=True)


@wrong("7.w3", "totals in 16 bits")
def owners(counts, size):
    return torch.searchsorted(
        counts.to(torch.int16).cumsum(0, dtype=torch.int16).long(), torch.arange(size, device=counts.device), right=True
    )


@wrong("7.w3", "reads the total, but on tensors without values")
def owners(counts, size):
    if counts.device.type != "meta":
        size = max(size, int(counts.sum() * 0))
    return torch.searchsorted(counts.cumsum(0), torch.arange(size, device=counts.device), right=True)


@alternative("7.w3", "counts the sequences that have ended")
def owners(counts, size):
    return (torch.arange(size, device=counts.device)[:, None] >= counts.cumsum(0)).sum(1)


# ---- 7.0


class Prefix:
    """The right pool, but for what `mistake` names."""

    mistake = ""

    def __init__(self, num_blocks, block_size):
        self.block_size, self.references = block_size, [0] * num_blocks
        self.queue = OrderedDict.fromkeys(range(num_blocks))
        self.block_of, self.name_of = {}, {}

    @property
    def num_free(self):
        return len(self.queue)

    def allocate(self):
        if not self.queue:
            if self.mistake == "None":
                return None
            raise OutOfBlocks
        block, _ = self.queue.popitem(last=self.mistake == "newest")
        if block in self.name_of and self.mistake != "stale":
            name = self.name_of.pop(block)
            if self.mistake != "half":
                del self.block_of[name]
        self.references[block] = 1
        return block

    def publish(self, block, name):
        if self.mistake == "last publisher" and name in self.block_of:
            del self.name_of[self.block_of.pop(name)]
        if self.mistake == "renames" and block in self.name_of:
            del self.block_of[self.name_of.pop(block)]
        taken = name in self.block_of
        if (not taken and block not in self.name_of) or (self.mistake == "two names" and not taken):
            self.block_of[name], self.name_of[block] = block, name

    def match_prefix(self, token_ids):
        size, name, found, what = self.block_size, b"", [], self.mistake
        stop = len(token_ids) if what == "all tokens" else len(token_ids) - 1
        if what == "one block less":
            stop = len(token_ids) - size
        for start in range(0, stop // size * size, size):
            name = chain_hash(b"" if what == "no chain" else name, token_ids[start : start + size])
            block = self.block_of.get(name)
            if block is None or (what == "in use only" and not self.references[block]):
                if what == "goes on":
                    continue
                break
            found.append(block)
            if what != "no count":
                self.references[block] += 1
            if what != "stays free":
                self.queue.pop(block, None)
        if what == "changes":
            del token_ids[-1:]
        return len(found) * size if what == "tokens" else found

    def release(self, block):
        if self.references[block] == 0 and self.mistake != "twice":
            raise ValueError
        if self.mistake == "first gone" or self.references[block] <= 1:
            self.references[block] = 0
            self.queue[block] = None
            named = block in self.name_of
            if self.mistake == "forgets" and named:
                del self.block_of[self.name_of.pop(block)]
            self.queue.move_to_end(block, last=(named or self.mistake == "all last") and self.mistake != "all first")
        else:
            self.references[block] -= 1


for name, what in {
    "None": "returns None when no block is free",
    "newest": "hands out the block released last",
    "stale": "leaves the name of a block that is handed out",
    "half": "forgets the block's name, and not the name's block",
    "last publisher": "the last to publish a name takes it over",
    "renames": "a block that has a name gets the new one",
    "two names": "a block may be found by two names",
    "all tokens": "finds all of a prompt: nothing is left to compute",
    "one block less": "leaves a whole block to compute where a token is enough",
    "no chain": "names a block by its own tokens",
    "in use only": "finds blocks in use alone",
    "goes on": "goes on behind a block that is not there",
    "no count": "finds blocks without counting the table",
    "stays free": "leaves a found block in the queue: it is handed out under its reader",
    "changes": "takes a token off the caller's prompt",
    "tokens": "returns how many tokens were found",
    "twice": "takes a free block back once more",
    "first gone": "frees a block when the first of its readers is gone",
    "forgets": "a free block loses its name",
    "all last": "blocks with nothing in them wait at the end, too",
    "all first": "the last one released goes first, with a name too",
}.items():
    wrong("7.0", what)(type("PrefixPool", (Prefix,), {"mistake": name}))
alternative("7.0", "an ordered dictionary and two for the names")(type("PrefixPool", (Prefix,), {}))


@wrong("7.0", "counts down before it looks")
class PrefixPool:
    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.references = [0] * num_blocks
        self.queue = OrderedDict.fromkeys(range(num_blocks))
        self.block_of = {}
        self.name_of = {}

    @property
    def num_free(self):
        return len(self.queue)

    def allocate(self):
        if not self.queue:
            raise OutOfBlocks("all blocks are in use")
        block, _ = self.queue.popitem(last=False)
        if block in self.name_of:
            del self.block_of[self.name_of.pop(block)]
        self.references[block] = 1
        return block

    def publish(self, block, name):
        if name not in self.block_of and block not in self.name_of:
            self.block_of[name], self.name_of[block] = (block, name)

    def match_prefix(self, token_ids):
        size, name, found = (self.block_size, b"", [])
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            name = chain_hash(name, token_ids[start : start + size])
            if name not in self.block_of:
                break
            found.append(self.block_of[name])
            self.references[found[-1]] += 1
            self.queue.pop(found[-1], None)
        return found

    def release(self, block):
        self.references[block] -= 1
        if self.references[block] < 0:
            raise ValueError(f"block {block} is free already")
        if self.references[block] == 0:
            self.queue[block] = None
            self.queue.move_to_end(block, last=block in self.name_of)


@alternative("7.0", "a list for the queue, a search through it, and a set of names for each block")
class PrefixPool:
    def __init__(self, num_blocks, block_size):
        self.size, self.queue, self.count = block_size, list(range(num_blocks)), {}
        self.names = [None] * num_blocks

    @property
    def num_free(self):
        return len(self.queue)

    def allocate(self):
        if not self.queue:
            raise OutOfBlocks
        block = self.queue.pop(0)
        self.names[block], self.count[block] = None, 1
        return block

    def publish(self, block, name):
        if name not in self.names and self.names[block] is None:
            self.names[block] = name

    def match_prefix(self, token_ids):
        found, name = [], b""
        while (len(found) + 1) * self.size < len(token_ids):
            start = len(found) * self.size
            name = chain_hash(name, token_ids[start : start + self.size])
            if name not in self.names:
                break
            block = self.names.index(name)
            if block in self.queue:
                self.queue.remove(block)
            self.count[block] = self.count.get(block, 0) + 1
            found.append(block)
        return found

    def release(self, block):
        if self.count.get(block, 0) < 1:
            raise ValueError
        self.count[block] -= 1
        if not self.count[block]:
            self.queue.insert(len(self.queue) if self.names[block] else 0, block)


@alternative("7.0", "the package's own pool")
class PrefixPool:
    def __init__(self, num_blocks, block_size):
        self.pool = BlockPool(num_blocks, block_size)
        self.allocate, self.publish, self.release = self.pool.allocate, self.pool.publish, self.pool.release

    @property
    def num_free(self):
        return self.pool.num_free

    def match_prefix(self, token_ids):
        table = BlockTable(self.pool)
        table.match_prefix(token_ids)
        return table.blocks


# ---- 7.1


class Table:
    """The right table, but for what `mistake` names."""

    mistake = ""

    def __init__(self, block_size, window, allocate, release):
        self.block_size, self.window, self.allocate, self.release = block_size, window, allocate, release
        self.blocks, self.num_tokens = [], 0

    forgotten = 0

    def forget(self, seen):
        begin = self.forgotten if self.mistake == "remembers" else 0
        for index in range(begin, min(max(0, seen) // self.block_size, len(self.blocks))):
            self.forgotten = index + 1
            if self.blocks[index] > 0 or (self.blocks[index] == 0 and self.mistake != "block 0"):
                self.release(self.blocks[index])
                self.blocks[index] = -1
        if self.mistake == "removes":
            self.blocks = [b for b in self.blocks if b >= 0]

    def extend(self, count):
        what = self.mistake
        seen = self.num_tokens - self.window + 1
        seen += {"early": 1, "late": -1, "last token": count - 1}.get(what, 0)
        old = list(self.blocks)
        if what not in ("keeps all", "allocates first"):
            self.forget(seen)
        before = len(self.blocks)
        try:
            while len(self.blocks) * self.block_size < self.num_tokens + count:
                self.blocks.append(self.allocate())
                if what == "one block":
                    break
        except OutOfBlocks:
            if what == "swallows":
                return
            if what == "another error":
                while len(self.blocks) > before:
                    self.release(self.blocks.pop())
                raise OutOfBlocks("no room") from None
            while len(self.blocks) > before and what != "leaks":
                self.release(self.blocks.pop())
            if what == "restores":
                self.blocks = old
            raise
        if what == "allocates first":
            self.forget(seen)
        self.num_tokens += count

    def free(self):
        for block in self.blocks:
            if block >= 0 or self.mistake == "frees the dead":
                self.release(block)
        if self.mistake == "counts on":
            self.blocks = []
        elif self.mistake != "stays":
            self.blocks, self.num_tokens = [], 0


@wrong("7.1", "gives back one position too early: the window holds W tokens, itself included")
class WindowTable(Table):
    mistake = "early"


@wrong("7.1", "gives back one position too late")
class WindowTable(Table):
    mistake = "late"


@wrong("7.1", "goes by the last new token: the first ones of a chunk lose keys that they see")
class WindowTable(Table):
    mistake = "last token"


@wrong("7.1", "never gives anything back")
class WindowTable(Table):
    mistake = "keeps all"


@wrong("7.1", "takes before it gives back: a tight pool has nothing left")
class WindowTable(Table):
    mistake = "allocates first"


@wrong("7.1", "removes dead entries from the list: positions are looked up in the wrong block")
class WindowTable(Table):
    mistake = "removes"


@wrong("7.1", "takes one block however many tokens come")
class WindowTable(Table):
    mistake = "one block"


@wrong("7.1", "keeps what it took when the pool ran dry")
class WindowTable(Table):
    mistake = "leaks"


@wrong("7.1", "after an error puts the whole old table back, with blocks that it has given away")
class WindowTable(Table):
    mistake = "restores"


@wrong("7.1", "swallows the error")
class WindowTable(Table):
    mistake = "swallows"


@wrong("7.1", "gives the dead back once more at the end")
class WindowTable(Table):
    mistake = "frees the dead"


@wrong("7.1", "free leaves the table as it was")
class WindowTable(Table):
    mistake = "stays"


@wrong("7.1", "keeps the index of the first living block beyond free: the next sequence forgets nothing")
class WindowTable(Table):
    mistake = "remembers"


@wrong("7.1", "free leaves num_tokens")
class WindowTable(Table):
    mistake = "counts on"


@wrong("7.1", "raises an error of its own")
class WindowTable(Table):
    mistake = "another error"


@wrong("7.1", "takes block 0 for a dead one")
class WindowTable(Table):
    mistake = "block 0"


@alternative("7.1", "a plain loop over all earlier blocks, and all blocks taken into a list first")
class WindowTable(Table):
    def extend(self, count):
        self.forget(self.num_tokens - self.window + 1)
        wanted, taken = -(-(self.num_tokens + count) // self.block_size) - len(self.blocks), []
        try:
            for _ in range(wanted):
                taken.append(self.allocate())
        except OutOfBlocks:
            for block in taken:
                self.release(block)
            raise
        self.blocks += taken
        self.num_tokens += count


# ---- 7.2


def slots(tables, starts, counts, size, block_size, rank=0, ranks=1, mistake=""):
    ends = counts.cumsum(0)
    token = torch.arange(size, device=tables.device)
    owner = torch.searchsorted(ends, token, right=mistake != "left")
    inside = owner < len(counts)
    owner = owner.clamp(max=len(counts) - 1)
    begins = ends - counts
    position = token - begins[owner]
    if mistake != "from 0":
        position = starts[owner] + position
    number = position // block_size
    held = number % ranks == rank
    entry = number // ranks
    if mistake == "global table":
        entry = number
    if mistake == "token by token":
        held, entry = position % ranks == rank, number // ranks
    if mistake == "stretches":
        width = tables.shape[1]
        held, entry = number // width == rank, number % width
    entry = entry.clamp(min=0, max=tables.shape[1] - 1)
    block = tables[owner, entry]
    if mistake == "int32":
        found = (block * block_size + (position % block_size).int()).long()
    else:
        found = block.long() * block_size + position % block_size
    if mistake == "padding":
        return torch.where(held, found, -1)
    if mistake == "zero":
        return torch.where(inside & held, found, 0)
    if mistake == "all ranks":
        return torch.where(inside, found, -1)
    return torch.where(inside & held, found, -1)


@wrong("7.2", "a token on the border goes to the sequence before")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks, "left")


@wrong("7.2", "positions count from 0 in each step")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks, "from 0")


@wrong("7.2", "looks up the block's number in the sequence, as if the table held all")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks, "global table")


@wrong("7.2", "deals out tokens instead of blocks")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks, "token by token")


@wrong("7.2", "gives each GPU a stretch of the context")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks, "stretches")


@wrong("7.2", "slots in int32: large pools overflow")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks, "int32")


@wrong("7.2", "padding writes into the last sequence's blocks")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks, "padding")


@wrong("7.2", "padding writes to slot 0")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks, "zero")


@wrong("7.2", "writes what another GPU holds")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks, "all ranks")


@wrong("7.2", "repeat_interleave: the output's shape depends on values")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    position = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner] + starts[owner]
    number = position // block_size
    entry = (number // ranks).clamp(max=tables.shape[1] - 1)
    found = tables[owner, entry].long() * block_size + position % block_size
    found = torch.where(number % ranks == rank, found, -1)
    return torch.nn.functional.pad(found, (0, size - len(found)), value=-1)


@wrong("7.2", "a loop over the sequences that reads their values")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    out, at = torch.full((size,), -1), 0
    for row, start, count in zip(tables.tolist(), starts.tolist(), counts.tolist(), strict=True):
        for p in range(start, start + count):
            if p // block_size % ranks == rank:
                out[at] = row[p // block_size // ranks] * block_size + p % block_size
            at += 1
    return out


@wrong("7.2", "reads the values through NumPy")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    table, first, many, found = np.asarray(tables.cpu()), np.asarray(starts.cpu()), np.asarray(counts.cpu()), []
    for row, start, count in zip(table, first, many, strict=True):
        for p in range(start, start + count):
            mine = p // block_size % ranks == rank
            found.append(int(row[p // block_size // ranks]) * block_size + p % block_size if mine else -1)
    return torch.tensor(found + [-1] * (size - len(found)), device=tables.device)


@wrong("7.2", "makes as many entries as there are tokens, and then pads: the CPU reads the total")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    found = slots(tables, starts, counts, size, block_size, rank, ranks)
    total = len(torch.arange(counts.sum(), device=tables.device))
    return torch.cat((found[:total], torch.full((size - total,), -1, device=tables.device)))


@wrong("7.2", "sets the padding through a slice that begins at a value")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    found = slots(tables, starts, counts, size, block_size, rank, ranks, "padding")
    found[counts.cumsum(0)[-1] :] = -1
    return found


@wrong("7.2", "new tensors on the CPU, whatever the device of the tables")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    ends, token = counts.cumsum(0), torch.arange(size)
    owner = torch.searchsorted(ends, token, right=True)
    inside, owner = owner < len(counts), owner.clamp(max=len(counts) - 1)
    position = starts[owner] + token - (ends - counts)[owner]
    number = position // block_size
    entry = (number // ranks).clamp(min=0, max=tables.shape[1] - 1)
    found = tables[owner, entry].long() * block_size + position % block_size
    return torch.where(inside & (number % ranks == rank), found, -1)


@wrong("7.2", "a boolean mask in the index")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    found = slots(tables, starts, counts, size, block_size, rank, ranks, "all ranks")
    ends = counts.cumsum(0)
    token = torch.arange(size)
    owner = torch.searchsorted(ends, token, right=True).clamp(max=len(counts) - 1)
    number = (starts[owner] + token - (ends - counts)[owner]) // block_size
    found[number % ranks != rank] = -1
    return found


@wrong("7.2", "positions in int32")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts.int(), counts.int(), size, block_size, rank, ranks)


@wrong("7.2", "slots as floating-point numbers")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables, starts, counts, size, block_size, rank, ranks).double()


@wrong("7.2", "reads the tables' memory as if it were contiguous")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    whole = tables.as_strided(tables.shape, (tables.shape[1], 1))
    return slots(whole, starts, counts, size, block_size, rank, ranks)


@wrong("7.2", "clamps the caller's tables")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    return slots(tables.clamp_(min=0), starts, counts, size, block_size, rank, ranks)


@wrong("7.2", "positions wrap at the width of this GPU's table")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    ends = counts.cumsum(0)
    token = torch.arange(size, device=tables.device)
    owner = torch.searchsorted(ends, token, right=True)
    inside = owner < len(counts)
    owner = owner.clamp(max=len(counts) - 1)
    position = starts[owner] % (block_size * tables.shape[1]) + token - (ends - counts)[owner]
    number = position // block_size
    entry = (number // ranks).clamp(min=0, max=tables.shape[1] - 1)
    slots = tables[owner, entry].long() * block_size + position % block_size
    return torch.where(inside & (number % ranks == rank), slots, -1)


@wrong("7.2", "refuses a result of no entries")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    assert size
    ends = counts.cumsum(0)
    token = torch.arange(size, device=tables.device)
    owner = torch.searchsorted(ends, token, right=True)
    inside = owner < len(counts)
    owner = owner.clamp(max=len(counts) - 1)
    position = starts[owner] + token - (ends - counts)[owner]
    number = position // block_size
    entry = (number // ranks).clamp(min=0, max=tables.shape[1] - 1)
    slots = tables[owner, entry].long() * block_size + position % block_size
    return torch.where(inside & (number % ranks == rank), slots, -1)


@alternative("7.2", "a loop over the sequences that reads no value")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    place = torch.arange(size, device=tables.device)
    found, begin = torch.full((size,), -1, device=tables.device), 0
    for row, start, count in zip(tables, starts, counts, strict=True):
        position = start + place - begin
        number = position // block_size
        entry = (number // ranks).clamp(min=0, max=len(row) - 1)
        slot = row[entry].long() * block_size + position % block_size
        mine = (place >= begin) & (place < begin + count)
        found = torch.where(mine & (number % ranks == rank), slot, found)
        begin = begin + count
    return found


@alternative("7.2", "all pairs of entry and sequence compared")
def slot_mapping(tables, starts, counts, size, block_size, rank=0, ranks=1):
    ends = counts.cumsum(0)
    begins, token = ends - counts, torch.arange(size, device=tables.device)[:, None]
    mine = (token >= begins) & (token < ends)  # [size, S]
    owner = mine.long().argmax(1)
    position = (mine * (starts + token - begins)).sum(1)
    number, offset = position // block_size, position % block_size
    entry = torch.minimum(number // ranks, torch.tensor(tables.shape[1] - 1, device=tables.device))
    found = tables.long()[owner, entry] * block_size + offset
    return found.masked_fill(~mine.any(1) | (number % ranks != rank), -1)


# ---- 7.3


def packed(*numbers):
    return array("q", numbers).tobytes()


def names(token_ids, block_size, salt="", images=(), mistake=""):
    seed, found = salt.encode() if mistake != "no salt" else b"", []
    parent = {"bare salt": seed, "salt last": b""}.get(mistake, hashlib.sha256(seed).digest())
    if mistake == "runs together" and images:
        parent = hashlib.sha256(seed + b"".join(d for *_, d in sorted(images))).digest()
    stop_at = len(token_ids) if mistake == "partial" else len(token_ids) // block_size * block_size
    for start in range(0, stop_at, block_size):
        stop = start + block_size
        tokens = token_ids[start:stop]
        if mistake == "text":
            key = hashlib.sha256(parent + "".join(map(str, tokens)).encode())
        elif mistake == "bytes":
            key = hashlib.sha256(parent + bytes(t & 255 for t in tokens))
        elif mistake == "32 bits":
            key = hashlib.sha256(parent + packed(*(t & 0xFFFFFFFF for t in tokens)))
        elif mistake == "any order":
            key = hashlib.sha256(parent + packed(*sorted(tokens)))
        else:
            key = hashlib.sha256(parent + packed(*tokens))
        for first, length, digest in images if mistake == "listed" else sorted(images):
            touches = first < stop and first + length > start
            if mistake == "all images":
                touches = True
            if mistake == "begins in it":
                touches = start <= first < stop
            if mistake == "inside":
                touches = start <= first and first + length <= stop
            if mistake == "one too far":
                touches = first <= stop and first + length > start
            if touches and mistake not in ("no images", "runs together"):
                place = packed(first - start, len(digest))
                place = {"no place": packed(len(digest)), "no length": packed(first - start)}.get(mistake, place)
                place = {"one byte": bytes([first - start & 255, len(digest)]) if mistake == "one byte" else b"",
                         "separators": f"{first}:".encode(), "digest alone": b""}.get(mistake, place)  # fmt: skip
                key.update(place + digest + (b"|" if mistake == "separators" else b""))
        if mistake == "salt last":
            key.update(seed)
        name = key.digest()
        if mistake != "no chain":
            parent = name
        found.append(name)
    return found


def with_mistake(what):
    return lambda token_ids, block_size, salt="", images=(): names(token_ids, block_size, salt, images, what)


for what, why in (
    ("no chain", "hashes a block's own tokens alone"),
    ("no salt", "forgets the tenant"),
    ("no images", "forgets the pictures: every picture is the same placeholder"),
    ("all images", "lets pictures behind the block count"),
    ("one too far", "a picture that begins at the block's end counts"),
    ("inside", "misses pictures that cross the border of a block"),
    ("no place", "a picture's place does not count"),
    ("digest alone", "appends digests without place and length"),
    ("listed", "takes pictures in the order in which they are listed"),
    ("runs together", "joins salt and digests without telling where one ends, before the first block"),
    ("bare salt", "hashes the salt, of any length, before the first tokens without saying where it ends"),
    ("salt last", "hashes the salt after the pictures without saying where they end"),
    ("separators", "puts separators around digests, which may hold them"),
    ("one byte", "has one byte for the length of a digest"),
    ("partial", "names the last block, which is not full"),
    ("text", "joins token ids as text"),
    ("bytes", "keeps the lowest byte of a token id"),
    ("32 bits", "keeps 32 bits of a token id"),
    ("any order", "sorts the tokens"),
):
    wrong("7.3", why)(with_mistake(what))


@wrong("7.3", "Python's hash in 16 bytes")
def block_names(token_ids, block_size, salt="", images=()):
    found, parent = [], hash(salt)
    for start in range(0, len(token_ids) // block_size * block_size, block_size):
        stop = start + block_size
        seen = tuple((f - start, n, d) for f, n, d in sorted(images) if f < stop and f + n > start)
        parent = hash((parent, tuple(token_ids[start:stop]), seen))
        found.append(parent.to_bytes(16, "big", signed=True))
    return found


@wrong("7.3", "a checksum, repeated to 16 bytes")
def block_names(token_ids, block_size, salt="", images=()):
    return [zlib.crc32(name).to_bytes(4, "big") + bytes(12) for name in names(token_ids, block_size, salt, images)]


@wrong("7.3", "hashes Python's hash of a text: other names in another process")
def block_names(token_ids, block_size, salt="", images=()):
    return [
        hashlib.sha256(str(hash(name.hex())).encode()).digest() for name in names(token_ids, block_size, salt, images)
    ]


@wrong("7.3", "names that depend on where an object lies")
def block_names(token_ids, block_size, salt="", images=()):
    mark = str(id(block_size)).encode()
    return [hashlib.sha256(mark + name).digest() for name in names(token_ids, block_size, salt, images)]


@wrong("7.3", "names that depend on the process")
def block_names(token_ids, block_size, salt="", images=()):
    mark = str(os.getpid()).encode()
    return [hashlib.sha256(mark + name).digest() for name in names(token_ids, block_size, salt, images)]


@wrong("7.3", "hashes how long a picture is")
def block_names(token_ids, block_size, salt="", images=()):
    return names(token_ids, block_size, salt, [(f, n, bytes([n & 255]) + d) for f, n, d in images])


@wrong("7.3", "sorts the caller's pictures")
def block_names(token_ids, block_size, salt="", images=()):
    if isinstance(images, list):
        images.sort()
    return names(token_ids, block_size, salt, images)


@wrong("7.3", "8 bytes of a hash, twice")
def block_names(token_ids, block_size, salt="", images=()):
    return [2 * name[:8] for name in names(token_ids, block_size, salt, images)]


@wrong("7.3", "MD5")
def block_names(token_ids, block_size, salt="", images=()):
    return [hashlib.md5(name).digest() for name in names(token_ids, block_size, salt, images)]


@wrong("7.3", "a checksum, four times")
def block_names(token_ids, block_size, salt="", images=()):
    return [4 * zlib.crc32(name).to_bytes(4, "big") for name in names(token_ids, block_size, salt, images)]


@wrong("7.3", "digests as text")
def block_names(token_ids, block_size, salt="", images=()):
    import hashlib
    from array import array

    parent, names = (hashlib.sha256(salt.encode()).digest(), [])
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        stop = start + block_size
        key = hashlib.sha256(parent + array("q", token_ids[start:stop]).tobytes())
        for first, _, digest in sorted(images):
            if start <= first < stop:
                key.update(
                    array("q", [first - start, len(digest)]).tobytes() + digest.decode(errors="replace").encode()
                )
        parent = key.digest()
        names.append(parent)
    return names


@wrong("7.3", "sorts pictures by digest")
def block_names(token_ids, block_size, salt="", images=()):
    import hashlib
    from array import array

    parent, names = (hashlib.sha256(salt.encode()).digest(), [])
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        stop = start + block_size
        key = hashlib.sha256(parent + array("q", token_ids[start:stop]).tobytes())
        for first, _, digest in sorted(images, key=lambda x: x[2]):
            if start <= first < stop:
                key.update(array("q", [first - start, len(digest)]).tobytes() + digest)
        parent = key.digest()
        names.append(parent)
    return names


@wrong("7.3", "salts as ASCII")
def block_names(token_ids, block_size, salt="", images=()):
    import hashlib
    from array import array

    parent, names = (hashlib.sha256(salt.encode("ascii", "replace")).digest(), [])
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        stop = start + block_size
        key = hashlib.sha256(parent + array("q", token_ids[start:stop]).tobytes())
        for first, _, digest in sorted(images):
            if start <= first < stop:
                key.update(array("q", [first - start, len(digest)]).tobytes() + digest)
        parent = key.digest()
        names.append(parent)
    return names


@wrong("7.3", "salts without spaces around them")
def block_names(token_ids, block_size, salt="", images=()):
    import hashlib
    from array import array

    parent, names = (hashlib.sha256(salt.strip().encode()).digest(), [])
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        stop = start + block_size
        key = hashlib.sha256(parent + array("q", token_ids[start:stop]).tobytes())
        for first, _, digest in sorted(images):
            if start <= first < stop:
                key.update(array("q", [first - start, len(digest)]).tobytes() + digest)
        parent = key.digest()
        names.append(parent)
    return names


@wrong("7.3", "salts in lower case")
def block_names(token_ids, block_size, salt="", images=()):
    import hashlib
    from array import array

    parent, names = (hashlib.sha256(salt.lower().encode()).digest(), [])
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        stop = start + block_size
        key = hashlib.sha256(parent + array("q", token_ids[start:stop]).tobytes())
        for first, _, digest in sorted(images):
            if start <= first < stop:
                key.update(array("q", [first - start, len(digest)]).tobytes() + digest)
        parent = key.digest()
        names.append(parent)
    return names


@alternative("7.3", "in hexadecimal")
def block_names(token_ids, block_size, salt="", images=()):
    return [name.hex().encode() for name in names(token_ids, block_size, salt, images)]


@alternative("7.3", "with the version of the scheme before each")
def block_names(token_ids, block_size, salt="", images=()):
    return [b"v1:" + name for name in names(token_ids, block_size, salt, images)]


@alternative("7.3", "a picture counts anew in every block that it reaches into")
def block_names(token_ids, block_size, salt="", images=()):
    return names(token_ids, block_size, salt, images)


@wrong("7.3", "text instead of bytes")
def block_names(token_ids, block_size, salt="", images=()):
    return [name.hex() for name in names(token_ids, block_size, salt, images)]


@alternative("7.3", "a picture counts where it begins, and the chain carries it on; BLAKE2b with the salt as text")
def block_names(token_ids, block_size, salt="", images=()):
    return names(token_ids, block_size, salt, images, "begins in it")


@alternative("7.3", "each name over the whole prefix, as text that tells its fields apart")
def block_names(token_ids, block_size, salt="", images=()):
    found = []
    for stop in range(block_size, len(token_ids) + 1, block_size):
        seen = sorted((f, d.hex()) for f, _, d in images if f < stop)
        text = repr((salt, [int(t) for t in token_ids[:stop]], seen))
        found.append(hashlib.blake2b(text.encode(), digest_size=20).digest())
    return found


# ---- 7.4


def scan(nodes, wanted, mistake=""):
    left, chosen, freed = dict(nodes), [], 0
    while freed < wanted or mistake == "everything":
        inner = {n.parent for n in left.values()}
        if mistake == "first leaves":
            inner = {n.parent for n in nodes.values()}
        able = [
            i for i, n in left.items()
            if (i not in inner or mistake == "inner") and (n.parent is not None or mistake == "root")
            and (not n.references or mistake == "in use")
        ]  # fmt: skip
        if not able:
            break
        pick = max if mistake == "youngest" else min
        key = (lambda i: -left[i].tokens) if mistake == "largest" else (lambda i: left[i].last_used)
        best = pick(able, key=key)
        if mistake == "stops before" and freed + left[best].tokens > wanted:
            break
        chosen.append(best)
        freed += 1 if mistake == "nodes" else left[best].tokens
        left.pop(best)
    return chosen


def scan_with(what):
    return lambda nodes, wanted: scan(nodes, wanted, what)


for what, why in (
    ("inner", "the least recently used node, leaf or not"),
    ("first leaves", "parents never become leaves"),
    ("root", "throws the root away too"),
    ("in use", "throws away what a request reads"),
    ("everything", "does not stop"),
    ("stops before", "stops before there is enough, not after"),
    ("nodes", "counts nodes instead of tokens"),
    ("youngest", "the most recently used first"),
    ("largest", "the largest leaf first"),
):
    wrong("7.4", why)(scan_with(what))


@wrong("7.4", "sorts the leaves once and lets new ones wait for the next round")
def evict(nodes, wanted):
    left, chosen, freed = dict(nodes), [], 0
    while freed < wanted:
        inner = {n.parent for n in left.values()}
        able = [i for i, n in left.items() if i not in inner and n.parent is not None and not n.references]
        if not able:
            break
        for i in sorted(able, key=lambda i: left[i].last_used):
            if freed < wanted:
                chosen.append(i)
                freed += left.pop(i).tokens
    return chosen


@wrong("7.4", "removes the nodes from the caller's tree")
def evict(nodes, wanted):
    chosen = scan(nodes, wanted)
    for i in chosen:
        del nodes[i]
    return chosen


@wrong("7.4", "takes nodes for leaves by what stands behind them in the dictionary")
def evict(nodes, wanted):
    left, chosen, freed = {}, [], 0
    seen = set()
    for i, node in reversed(nodes.items()):
        if i not in seen and node.parent is not None and not node.references:
            left[i] = node
        seen.add(node.parent)
    for i in sorted(left, key=lambda i: left[i].last_used):
        if freed < wanted:
            chosen.append(i)
            freed += left[i].tokens
    return chosen


@wrong("7.4", "returns a set: the order is lost")
def evict(nodes, wanted):
    return set(scan(nodes, wanted))


@wrong("7.4", "whole seconds")
def evict(nodes, wanted):
    import heapq
    from collections import Counter

    children = Counter(node.parent for node in nodes.values())

    def goes(i):
        return nodes[i].parent is not None and (not children[i]) and (not nodes[i].references)

    leaves, chosen, freed = ([(int(nodes[i].last_used), i) for i in nodes if goes(i)], [], 0)
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


@wrong("7.4", "passes over leaves without tokens")
def evict(nodes, wanted):
    import heapq
    from collections import Counter

    children = Counter(node.parent for node in nodes.values())

    def goes(i):
        return nodes[i].parent is not None and (not children[i]) and (not nodes[i].references)

    leaves, chosen, freed = ([(nodes[i].last_used, i) for i in nodes if goes(i)], [], 0)
    heapq.heapify(leaves)
    while leaves and freed < wanted:
        _, i = heapq.heappop(leaves)
        if not nodes[i].tokens:
            continue
        chosen.append(i)
        freed += nodes[i].tokens
        parent = nodes[i].parent
        children[parent] -= 1
        if goes(parent):
            heapq.heappush(leaves, (nodes[parent].last_used, parent))
    return chosen


@wrong("7.4", "stops at a leaf without tokens")
def evict(nodes, wanted):
    import heapq
    from collections import Counter

    children = Counter(node.parent for node in nodes.values())

    def goes(i):
        return nodes[i].parent is not None and (not children[i]) and (not nodes[i].references)

    leaves, chosen, freed = ([(nodes[i].last_used, i) for i in nodes if goes(i)], [], 0)
    heapq.heapify(leaves)
    while leaves and freed < wanted and nodes[leaves[0][1]].tokens:
        _, i = heapq.heappop(leaves)
        chosen.append(i)
        freed += nodes[i].tokens
        parent = nodes[i].parent
        children[parent] -= 1
        if goes(parent):
            heapq.heappush(leaves, (nodes[parent].last_used, parent))
    return chosen


@alternative("7.4", "looks at all nodes again for every choice")
def evict(nodes, wanted):
    return scan(nodes, wanted)


# ---- 7.5


@triton.jit
def switched_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, context_ptr, stride_table, window, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WRONG: tl.constexpr,
):  # fmt: skip
    """The right kernel, but for what WRONG names."""
    sequence, head_kv = tl.program_id(0), tl.program_id(1)
    row, offs_d, offs_n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK_SIZE)
    head = head_kv * GROUP + row
    if WRONG == "heads":
        head = row * H_KV + head_kv
    offs_q = (sequence * H_KV * GROUP + head[:, None]) * D + offs_d[None, :]
    used = row[:, None] < GROUP
    if WRONG == "q unmasked":
        q = tl.load(q_ptr + offs_q)
    else:
        q = tl.load(q_ptr + offs_q, mask=used, other=0.0)
    context = tl.load(context_ptr + sequence)
    first = tl.maximum(context - window, 0)
    if WRONG == "window + 1":
        first = tl.maximum(context - window - 1, 0)
    if WRONG == "window - 1":
        first = tl.maximum(context - window + 1, 0)
    begin, end = first // BLOCK_SIZE, tl.cdiv(context, BLOCK_SIZE)
    if WRONG == "from the start":
        begin = 0
    if WRONG == "stops early":
        end = context // BLOCK_SIZE
    if WRONG == "all blocks":
        begin = 0
    if WRONG == "one early":
        begin = tl.maximum(begin - 1, 0)
    if WRONG == "one late":
        end = context // BLOCK_SIZE + 1
    if WRONG == "eight blocks":
        begin = tl.maximum(begin, end - 8)
    row_max = tl.full((ROWS,), -1.0e30, tl.float32)
    row_sum, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for index in range(begin, end):
        table = table_ptr + sequence * stride_table
        if WRONG == "first table":
            table = table_ptr
        block = tl.load(table + index).to(tl.int64)
        if WRONG == "16 bits":
            block = block.to(tl.int16).to(tl.int64)
        if WRONG == "no table":
            block = block * 0 + index
        position = index * BLOCK_SIZE + offs_n
        seen = (position >= first) & (position < context)
        if WRONG == "no window in the block":
            seen = position < context
        if WRONG == "no end":
            seen = position >= first
        offs_kv = ((block * BLOCK_SIZE + offs_n) * H_KV + head_kv)[:, None] * D + offs_d[None, :]
        if WRONG == "sizes exchanged":
            offs_kv = ((block * D + offs_n) * H_KV + head_kv)[:, None] * D + offs_d[None, :]
        if WRONG == "heads outside":
            offs_kv = (block * BLOCK_SIZE * H_KV + head_kv * BLOCK_SIZE + offs_n)[:, None] * D + offs_d[None, :]
        if WRONG == "from the start":
            k = tl.load(k_ptr + offs_kv)
        else:
            k = tl.load(k_ptr + offs_kv, mask=seen[:, None], other=0.0)
        if WRONG == "v unmasked":
            v = tl.load(v_ptr + offs_kv)
        else:
            v = tl.load(v_ptr + offs_kv, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if WRONG == "hides with -1e4":
            scores = tl.where(seen[None, :], scores, -1.0e4)
        elif WRONG != "zeros count":
            scores = tl.where(seen[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        if WRONG == "no maximum":
            new_max = tl.zeros((ROWS,), tl.float32)
        weights, shrink = tl.exp(scores - new_max[:, None]), tl.exp(row_max - new_max)
        if WRONG == "no maximum":
            shrink = tl.zeros((ROWS,), tl.float32) + 1.0
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        if WRONG != "no rescaling":
            acc = acc * shrink[:, None]
        if WRONG == "tf32":
            acc += tl.dot(weights.to(v.dtype), v)
        else:
            acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        if WRONG == "sums in fp16":
            acc = acc.to(v.dtype).to(tl.float32)
        row_max = new_max
        if WRONG == "sum in fp16":
            row_sum = row_sum.to(v.dtype).to(tl.float32)
        if WRONG == "maximum in fp16":
            row_max = new_max.to(v.dtype).to(tl.float32)
    if WRONG == "0 / 0":
        out = acc / row_sum[:, None]
    else:
        out = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    if WRONG == "all rows":
        tl.store(out_ptr + offs_q, out.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptr + offs_q, out.to(out_ptr.dtype.element_ty), mask=used)


def launch(q, k_cache, v_cache, tables, context_lens, window, block_size, what="", kernel=switched_kernel):
    out, kv_heads = torch.empty_like(q), k_cache.shape[1]
    group = q.shape[1] // kv_heads
    more = {"WRONG": what} if kernel is switched_kernel else {}
    kernel[(kv_heads, len(q)) if what == "grid" else (len(q), kv_heads)](
        q, k_cache, v_cache, out, tables, context_lens, tables.stride(0), window, q.shape[2] ** -0.5, H_KV=kv_heads,
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), D=q.shape[2], BLOCK_SIZE=block_size, **more,
    )  # fmt: skip
    return out


def launch_with(what):
    return lambda *args: launch(*args, what)


for what, why in (
    ("heads", "query head h reads key/value head h % H_KV"),
    ("window + 1", "the window is one token too long"),
    ("window - 1", "the window is one token too short"),
    ("no window in the block", "all slots of the first visited block count"),
    ("stops early", "the last block, when it is not full, is not visited"),
    ("first table", "every sequence reads the first one's table"),
    ("no table", "takes the index for the block"),
    ("no end", "slots past the context count"),
    ("heads outside", "the cache as [blocks, heads, slots, D]"),
    ("sizes exchanged", "blocks of D slots"),
    ("from the start", "begins at block 0, reads keys through -1, and masks their scores"),
    ("v unmasked", "weights of 0 times NaN in V"),
    ("zeros count", "masked keys count with a score of 0"),
    ("no maximum", "no maximum: exponentials overflow"),
    ("no rescaling", "does not rescale the accumulator"),
    ("sums in fp16", "keeps the weighted sum in the dtype of the cache"),
    ("all rows", "stores the unused rows too"),
    ("grid", "the axes of the grid exchanged"),
    ("0 / 0", "a context of 0 gives NaN"),
    ("all blocks", "begins at block 0, with everything masked"),
    ("one early", "visits one block before the window, with everything masked"),
    ("one late", "visits one block more where the last one is full"),
    ("eight blocks", "the window reaches over eight blocks at most"),
    ("q unmasked", "loads rows of q past the group"),
    ("16 bits", "block numbers in 16 bits"),
    ("hides with -1e4", "hides with -1e4: scores that are lower hide instead"),
    ("sum in fp16", "the running sum in fp16"),
    ("maximum in fp16", "the running maximum in fp16"),
    ("tf32", "the second product as it is: fp32 is cut to TF32 on a GPU"),
):
    wrong("7.5", why)(launch_with(what))


@wrong("7.5", "16 rows, whatever GROUP is")
def window_decode(q, k_cache, v_cache, tables, context_lens, window, block_size):
    out, kv_heads = torch.zeros_like(q), k_cache.shape[1]
    switched_kernel[(len(q), kv_heads)](
        q, k_cache, v_cache, out, tables, context_lens, tables.stride(0), window, q.shape[2] ** -0.5, H_KV=kv_heads,
        GROUP=q.shape[1] // kv_heads, ROWS=16, D=q.shape[2], BLOCK_SIZE=block_size, WRONG="",
    )  # fmt: skip
    return out


@wrong("7.5", "takes the tables for contiguous")
def window_decode(q, k_cache, v_cache, tables, context_lens, window, block_size):
    whole = tables.as_strided(tables.shape, (tables.shape[1], 1))
    return launch(q, k_cache, v_cache, whole, context_lens, window, block_size)


@wrong("7.5", "a program for each query head: every key is read GROUP times")
def window_decode(q, k_cache, v_cache, tables, context_lens, window, block_size):
    out, kv_heads, group = torch.empty_like(q), k_cache.shape[1], q.shape[1] // k_cache.shape[1]
    per_head_kernel[(len(q), q.shape[1])](
        q, k_cache, v_cache, out, tables, context_lens, tables.stride(0), window, q.shape[2] ** -0.5, H_KV=kv_heads,
        GROUP=group, D=q.shape[2], BLOCK_SIZE=block_size,
    )  # fmt: skip
    return out


@triton.jit
def per_head_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, context_ptr, stride_table, window, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Right, with a program for each query head."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    offs_d, offs_n = tl.arange(0, D), tl.arange(0, BLOCK_SIZE)
    offs_q = (sequence * H_KV * GROUP + head) * D + offs_d
    q = tl.load(q_ptr + offs_q).to(tl.float32)
    context = tl.load(context_ptr + sequence)
    first = tl.maximum(context - window, 0)
    row_max, row_sum, acc = -1.0e30, 0.0, tl.zeros((D,), tl.float32)
    for index in range(first // BLOCK_SIZE, tl.cdiv(context, BLOCK_SIZE)):
        block = tl.load(table_ptr + sequence * stride_table + index).to(tl.int64)
        position = index * BLOCK_SIZE + offs_n
        seen = (position >= first) & (position < context)
        offs_kv = ((block * BLOCK_SIZE + offs_n) * H_KV + head // GROUP)[:, None] * D + offs_d[None, :]
        k = tl.load(k_ptr + offs_kv, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offs_kv, mask=seen[:, None], other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(k * q[None, :], 1) * scale, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        weights, shrink = tl.exp(scores - new_max), tl.exp(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * v, 0)
        row_max = new_max
    out = acc / tl.where(row_sum == 0, 1.0, row_sum)
    tl.store(out_ptr + offs_q, out.to(out_ptr.dtype.element_ty))


@wrong("7.5", "gathers the keys and leaves the work to torch")
def window_decode(q, k_cache, v_cache, tables, context_lens, window, block_size):
    out = torch.zeros_like(q)
    groups = q.shape[1] // k_cache.shape[1]
    for i, context in enumerate(context_lens.tolist()):
        if context:
            p = torch.arange(max(0, context - window), context, device=q.device)
            at = tables[i][p // block_size].long() * block_size + p % block_size
            k, v = (c[at].repeat_interleave(groups, 1).transpose(0, 1) for c in (k_cache, v_cache))
            scores = (q[i][:, None].float() @ k.float().mT) * q.shape[2] ** -0.5
            out[i] = (scores.softmax(-1) @ v.float())[:, 0].to(q.dtype)
    return out


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, context_ptr, stride_table, window, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """From the newest block to the oldest, with 2^x, without tl.dot."""
    sequence, head_kv = tl.program_id(0), tl.program_id(1)
    row, offs_d, offs_n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK_SIZE)
    offs_q = ((sequence * H_KV + head_kv) * GROUP + row[:, None]) * D + offs_d[None, :]
    used = row[:, None] < GROUP
    q = tl.load(q_ptr + offs_q, mask=used, other=0.0).to(tl.float32) * (scale * 1.4426950408889634)
    context = tl.load(context_ptr + sequence)
    first = tl.maximum(context - window, 0)
    row_max = tl.full((ROWS,), -1.0e30, tl.float32)
    row_sum, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    end = tl.cdiv(context, BLOCK_SIZE)
    for back in range(end - first // BLOCK_SIZE):
        index = end - 1 - back
        block = tl.load(table_ptr + sequence * stride_table + index).to(tl.int64)
        position = index * BLOCK_SIZE + offs_n
        seen = (position >= first) & (position < context)
        offs_kv = ((block * BLOCK_SIZE + offs_n) * H_KV + head_kv)[:, None] * D + offs_d[None, :]
        k = tl.load(k_ptr + offs_kv, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offs_kv, mask=seen[:, None], other=0.0).to(tl.float32)
        scores = tl.sum(q[:, None, :] * k[None, :, :], 2)  # [ROWS, BLOCK_SIZE]
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - new_max[:, None]), tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], 1)
        row_max = new_max
    out = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    tl.store(out_ptr + offs_q, out.to(out_ptr.dtype.element_ty), mask=used)


@alternative("7.5", "from the newest block to the oldest, with 2^x, without tl.dot")
def window_decode(*args):
    return launch(*args, kernel=backward_kernel)


@alternative("7.5", "the same loop, masks written otherwise")
def window_decode(*args):
    return launch(*args)


@triton.jit
def untyped_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, context_ptr, stride_table, window, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The sum begins as the integer 0: the interpreter does not mind."""
    sequence, head_kv = tl.program_id(0), tl.program_id(1)
    row, offs_d, offs_n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK_SIZE)
    offs_q = ((sequence * H_KV + head_kv) * GROUP + row[:, None]) * D + offs_d[None, :]
    used = row[:, None] < GROUP
    q = tl.load(q_ptr + offs_q, mask=used, other=0.0).to(tl.float32) * (scale * 1.4426950408889634)
    context = tl.load(context_ptr + sequence)
    first = tl.maximum(context - window, 0)
    row_max = tl.full((ROWS,), -1.0e30, tl.float32)
    row_sum, acc = 0, tl.zeros((ROWS, D), tl.float32)
    end = tl.cdiv(context, BLOCK_SIZE)
    for back in range(end - first // BLOCK_SIZE):
        index = end - 1 - back
        block = tl.load(table_ptr + sequence * stride_table + index).to(tl.int64)
        position = index * BLOCK_SIZE + offs_n
        seen = (position >= first) & (position < context)
        offs_kv = ((block * BLOCK_SIZE + offs_n) * H_KV + head_kv)[:, None] * D + offs_d[None, :]
        k = tl.load(k_ptr + offs_kv, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offs_kv, mask=seen[:, None], other=0.0).to(tl.float32)
        scores = tl.sum(q[:, None, :] * k[None, :, :], 2)  # [ROWS, BLOCK_SIZE]
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - new_max[:, None]), tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], 1)
        row_max = new_max
    out = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    tl.store(out_ptr + offs_q, out.to(out_ptr.dtype.element_ty), mask=used)


@wrong("7.5", "does not compile: the sum begins as the integer 0")
def window_decode(*args):
    return launch(*args, kernel=untyped_kernel)
