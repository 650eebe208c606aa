"""Which tokens may come: all of a vocabulary at once, by one walk of automaton and trie together.

Tokens share beginnings, so their bytes make a tree, a trie: 49,152 tokens of SmolLM2 have 332,000 bytes and 100,000
nodes. A walk takes all nodes of one depth with the automaton's state at each, looks up all next states in one
operation, drops what is dead, and goes one deeper. A token may come if its last node is reached.

Within a JSON string nearly the whole trie is alive, and the walk takes milliseconds. But a string is the same
everywhere. A state "rest of a string, then t" is a `concat`, and

    tokens(h t) = tokens that stay inside h, and those that leave h and go on in t

where the first part, and the nodes at which h may end, depend on h alone: they are kept, for all requests. What
remains is a walk from where a string ends: few nodes.

Masks are kept by the digest of a state, so that requests with the same schema share them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from .automaton import DEAD, Automaton, ConstraintError, Node

__all__ = ["ByteTokens", "NoTokenFits", "Vocabulary", "packed"]

Mask = NDArray[np.bool_]
WIDE = ("concat", "repeat", "and")  # heads that may hold much of the trie; a literal or a set of bytes holds little
LARGEST_BODY = 200  # states of what is repeated, up to which its repeats are counted
FEW, FEW_BYTES = 500, 16


class NoTokenFits(ConstraintError):
    """The text is not finished, and no token of the vocabulary can go on with it."""


class ByteTokens(Protocol):
    """What is asked of a tokenizer: `Tokenizer` and `HuggingFaceTokenizer` have it."""

    special_tokens: dict[str, int]
    eos_token_id: int | None

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token. Raises ValueError for an id that no token has."""


def packed(mask: Mask) -> NDArray[np.int32]:
    """Token 32 w + i as bit i of word w, as kernels read it.  bool [V] -> int32 [ceil(V / 32)]"""
    bits = np.packbits(mask, bitorder="little")
    return np.pad(bits, (0, -len(bits) % 4)).view("<i4")


class _Kept:
    """A cache that forgets what was used longest ago when it holds more bytes than it may."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._items: OrderedDict[bytes, tuple[NDArray, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes, make: Callable[[], tuple[NDArray, ...]]) -> tuple[NDArray, ...]:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        value = make()
        for array in value:
            array.setflags(write=False)
        with self._lock:
            self._size += sum([a.nbytes for a in value]) if key not in self._items else 0
            self._items[key] = value
            while self._size > self._limit and len(self._items) > 1:
                self._size -= sum([a.nbytes for a in self._items.popitem(last=False)[1]])
        return value


class Vocabulary:
    """The tokens of a tokenizer as a trie of their bytes, and the masks that were made of it.

    tokens: the bytes of each id; None or b"" for one that never may come (special tokens, ids of nobody).
    end_ids: the tokens that end a text. size: of a mask, if the model has more logits than the tokenizer tokens.
    cache_bytes: what kept masks may hold. Build one for each tokenizer and keep it: it takes a tenth of a second.
    Raises ValueError for end tokens that are not in the vocabulary.
    """

    def __init__(
        self,
        tokens: Sequence[bytes | None],
        end_ids: Collection[int],
        size: int | None = None,
        cache_bytes: int = 96_000_000,
    ) -> None:
        self.size = len(tokens) if size is None else size
        if self.size < len(tokens):
            raise ValueError(f"size: expected at least the {len(tokens)} tokens, got {size}")
        if bad := [i for i in end_ids if not 0 <= i < self.size]:
            raise ValueError(f"end_ids: expected ids in 0..{self.size - 1}, got {bad[0]}")
        self.end_ids = np.array(sorted(set(end_ids)), np.intp)
        self.ends = frozenset(end_ids)
        self.tokens = [None if i in self.ends else token or None for i, token in enumerate(tokens)]
        self._build(self.tokens)
        self._masks, self._walks = _Kept(cache_bytes * 2 // 3), _Kept(cache_bytes // 3)
        self._equal: WeakValueDictionary[bytes, NDArray] = WeakValueDictionary()

    @classmethod
    def of(cls, tokenizer: ByteTokens, end_ids: Collection[int] | None = None, size: int | None = None) -> "Vocabulary":
        """The vocabulary of a tokenizer, special tokens left out. end_ids: its end-of-sequence token if None.

        A token that stands for no bytes of its own, as the unknown token of other families does, never may come.
        """
        special = set(tokenizer.special_tokens.values())
        tokens: list[bytes | None] = []
        for i in range(tokenizer.vocab_size):
            try:
                token = None if i in special else tokenizer.token_bytes(i)
            except ValueError:  # nobody's id
                token = None
            tokens.append(None if token is None or "\ufffd".encode() in token else token)
        if end_ids is None:
            end_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return cls(tokens, end_ids, size)

    def _build(self, tokens: Sequence[bytes | None]) -> None:
        """The trie, level by level; nodes are numbered so that the children of one stand side by side.

        node_byte uint8 [N], parent, first_child, children int64 [N]: the root is 0. end_node int64 [size]: where a
        token ends, N for one that never may come.
        """
        ids = np.array([i for i, token in enumerate(tokens) if token], np.intp)
        texts = [token for token in tokens if token]
        lengths = np.array([len(text) for text in texts], np.intp)
        offsets = np.cumsum(lengths) - lengths
        text = np.frombuffer(b"".join(texts), np.uint8)
        at = np.zeros(len(texts), np.int64)  # the node that each token has come to
        parents, node_bytes, count = [np.array([-1])], [np.zeros(1, np.uint8)], 1
        levels = []
        for depth in range(int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > depth)
            edges, which = np.unique(at[longer] * 256 + text[offsets[longer] + depth], return_inverse=True)
            at[longer] = count + which
            parents.append(edges // 256)
            node_bytes.append((edges % 256).astype(np.uint8))
            levels.append((count, count + len(edges)))
            count += len(edges)
        self.node_byte, self.parent = np.concatenate(node_bytes), np.concatenate(parents)
        self.children = np.bincount(self.parent[1:], minlength=count)
        self.first_child = 1 + np.cumsum(self.children) - self.children
        # Nodes of byte b, from _byte_at[b] to _byte_at[b + 1].
        self._by_byte = 1 + np.argsort(self.node_byte[1:], kind="stable")
        self._byte_at = np.searchsorted(self.node_byte[self._by_byte], np.arange(257))
        self.end_node = np.full(self.size, count)
        self.end_node[ids] = at
        self._nodes, self._levels = count, levels
        self._below = np.ones(count, np.intp)  # nodes of the subtree
        for first, last in reversed(levels):
            self._below[:first] += np.bincount(self.parent[first:last], self._below[first:last], first).astype(np.intp)

    # ---- masks -----------------------------------------------------------------------------------------------------

    def mask(self, automaton: Automaton, state: int) -> Mask:
        """The tokens that may come in a state: bool [size], read-only. End tokens may where the automaton accepts.

        Raises NoTokenFits when there is none, ConstraintTooLarge beyond the automaton's limits.
        """
        bits = np.unpackbits(self.packed(automaton, state).view(np.uint8), count=self.size, bitorder="little")
        bits.setflags(write=False)
        return bits.view(np.bool_)

    def packed(self, automaton: Automaton, state: int) -> NDArray[np.int32]:
        """The same as bits, see `packed`; equal ones are one array, as long as they are kept."""
        node = automaton.nodes[state]
        return self._masks.get(node.digest, lambda: (self._one_of(packed(self._make_mask(automaton, node))),))[0]

    def _one_of(self, mask: NDArray[np.int32]) -> NDArray[np.int32]:
        """Of equal masks the same array: at most places of a long string the same tokens may come."""
        return self._equal.setdefault(blake2b(mask.tobytes(), digest_size=16).digest(), mask)

    def _make_mask(self, automaton: Automaton, node: Node) -> Mask:
        reached, _ = self._reach(automaton, node)
        mask = reached[self.end_node]
        if node.nullable:
            mask[self.end_ids] = True
        if not mask.any():
            raise NoTokenFits(
                "constraint: the text is not finished, and no token can go on with it: the vocabulary lacks a byte "
                "that the constraint asks for; allow other characters"
            )
        return mask

    def _reach(self, automaton: Automaton, node: Node) -> tuple[Mask, Mask]:
        """Nodes of the trie where the automaton is alive, and those where it accepts, each bool [N + 1].

        Where it can, from walks of parts that were kept; else by a walk of its own.
        """
        kind, args = node.kind, node.args
        if kind == "concat" and args[0].kind in WIDE:
            return self._onward(automaton, node)
        if kind == "repeat" and args[1:] != (0, None) and self._counts(automaton, args[0]):
            return self._counted(automaton, *args)
        if kind == "and" and "not" in (args[0].kind, args[1].kind):
            return self._without(automaton, node)
        if kind == "union" and any([_is_wide(member) for member in args]):
            return self._any(automaton, args)
        reached, accepted = self._marks()
        far = kind in ("repeat", "and") and self._leads_far(automaton, automaton.state(node))
        go = self._sweep if far else self._walk
        go(automaton, automaton.state(node), [0], reached, accepted)
        reached[0] = False  # an empty token is none
        return reached, accepted

    def _leads_far(self, automaton: Automaton, state: int) -> bool:
        """Whether much of the trie is below the bytes that may come first."""
        self._expand(automaton, [state])
        first = np.arange(1, 1 + self.children[0])
        return bool(self._below[first[automaton.table[state, self.node_byte[first]] != DEAD]].sum() > self._nodes // 4)

    def _marks(self) -> NDArray[np.bool_]:
        return np.zeros((2, self._nodes + 1), np.bool_)

    def _kept_reach(self, automaton: Automaton, node: Node) -> NDArray[np.bool_]:
        """What `_reach` says, kept for all requests: bool [2, N + 1]."""

        def make() -> tuple[NDArray, ...]:
            return (np.packbits(np.stack(self._reach(automaton, node)), axis=1),)

        (packed,) = self._walks.get(node.digest, make)
        return np.unpackbits(packed, axis=1, count=self._nodes + 1).view(np.bool_)

    def _onward(self, automaton: Automaton, node: Node) -> tuple[Mask, Mask]:
        """Of a concat: inside the head, and on from where it may end."""
        head, tail = node.args
        reached, exits = self._kept_reach(automaton, head)
        nodes, state = np.flatnonzero(exits), automaton.state(tail)
        accepted = np.zeros_like(reached)
        self._expand(automaton, [state])
        live = np.flatnonzero(automaton.table[state])
        if len(nodes) > FEW and len(live) <= FEW_BYTES:  # quicker to ask all nodes of these bytes for their parents
            accepted[nodes] = automaton.accepting[state]
            child = np.concatenate([self._with_byte(byte) for byte in live.tolist()] or [nodes[:0]])
            child = child[exits[self.parent[child]]]
            self._walk(automaton, automaton.table[state, self.node_byte[child]], child, reached, accepted)
        elif len(nodes) <= FEW:
            self._walk(automaton, state, nodes, reached, accepted)
        elif not self._sweep(automaton, state, nodes, reached, accepted):
            # Walks from different nodes meet in different states. As one automaton they are in one state at a time.
            self._sweep(automaton, automaton.state(node), [0], reached, accepted)
        reached[0] = False
        return reached, accepted

    def _any(self, automaton: Automaton, members: Sequence[Node]) -> tuple[Mask, Mask]:
        """Of a union: each wide member for itself, for its walks may be kept; the others together."""
        wide = [member for member in members if _is_wide(member)]
        parts = [*wide, automaton.union([member for member in members if not _is_wide(member)])]
        found = [np.stack(self._reach(automaton, part)) for part in parts]
        reached, accepted = np.bitwise_or.reduce(found)
        return reached, accepted

    def _without(self, automaton: Automaton, node: Node) -> tuple[Mask, Mask]:
        """Of "a and not b": as of a, but where b is alive, too; b is some names, so these nodes are few."""
        inverse, plain = sorted(node.args, key=lambda part: part.kind != "not")
        reached, accepted = self._kept_reach(automaton, plain)
        zone, _ = self._reach(automaton, inverse.args[0])
        zone[0] = True
        inside = self._marks()
        self._walk(automaton, automaton.state(node), [0], inside[0], inside[1], within=zone)
        reached[zone], accepted[zone] = inside[0, zone], inside[1, zone]
        reached[0] = False
        return reached, accepted

    def _counts(self, automaton: Automaton, body: Node) -> bool:
        """Whether it can be counted how often `body` was passed: nothing that it holds goes on to be another of it."""
        seen, ahead = {body}, [body]
        with automaton.timed():
            while ahead and len(seen) <= LARGEST_BODY:
                moves = automaton.moves(ahead.pop())
                ahead += [after for _, after in moves if after not in seen]
                seen.update(ahead)
            return not ahead and not any([node.nullable and automaton.moves(node) for node in seen])

    def _counted(self, automaton: Automaton, body: Node, least: int, most: int | None) -> tuple[Mask, Mask]:
        """Of a repeat {least,most}, from a walk of * that counts: a limit on a string's length costs no walk.

        A node is alive if the repeats that ended before it, and the one that is open there, are at most `most`.
        """
        star = automaton.repeat(body)

        def walk() -> tuple[NDArray, ...]:
            reached, accepted = self._marks()
            times = np.zeros(self._nodes + 1, np.int16)  # a token is shorter than 32,768 bytes
            self._sweep(automaton, automaton.state(star), [0], reached, accepted, times)
            reached[0] = False
            return reached, accepted, times

        reached, accepted, times = self._walks.get(b"counted" + star.digest, walk)
        more = int(times.max()) + 1  # than any token holds, the open one included
        least, most = min(least, more), more if most is None else min(most, more)
        return reached & (times + ~accepted <= most), accepted & (times >= least) & (times <= most)

    # ---- two ways to walk ------------------------------------------------------------------------------------------

    def _walk(
        self,
        automaton: Automaton,
        state: int | NDArray[np.int32],
        nodes: NDArray[np.intp] | list[int],
        reached: Mask,
        accepted: Mask,
        within: Mask | None = None,
    ) -> None:
        """Go from some nodes of the trie, all in one state or each in its own, as deep as the automaton lives.

        Marks the nodes that are `reached`, and those where it is `accepted`; with `within` it goes nowhere else.
        """
        nodes = np.asarray(nodes, np.intp)
        states = np.broadcast_to(np.asarray(state, np.int32), nodes.shape)
        reached[nodes] = True
        while len(nodes):
            complete = automaton.accepting[states]
            accepted[nodes[complete]] = True
            self._expand(automaton, states)
            counts = self.children[nodes]
            ahead = np.cumsum(counts) - counts  # children of the nodes in front
            child = np.arange(counts.sum()) + np.repeat(self.first_child[nodes] - ahead, counts)
            states = automaton.table[np.repeat(states, counts), self.node_byte[child]]
            alive = np.flatnonzero(states if within is None else states * within[child])
            nodes, states = child[alive], states[alive]
            reached[nodes] = True

    def _sweep(
        self,
        automaton: Automaton,
        state: int,
        nodes: NDArray[np.intp] | list[int],
        reached: Mask,
        accepted: Mask,
        times: NDArray[np.int16] | None = None,
    ) -> bool:
        """The same for a walk that goes nearly everywhere: all nodes of a depth, dead ones too, which are one slice.

        Each node can be in one state only. False, and nothing marked, if a walk comes to one of `nodes` in another.
        Counts in `times` how often it accepted on the way.
        """
        states = np.zeros(self._nodes + 1, np.int32)
        states[nodes] = state
        begins = states != DEAD
        for first, last in self._levels:
            before = self.parent[first:last]
            came = states[before]
            self._expand(automaton, came)
            here = automaton.table.take(came * 256 + self.node_byte[first:last])
            starts = begins[first:last]
            if starts.any():
                if (here[starts] * (here[starts] != state)).any():
                    return False
                here[starts] = state
            states[first:last] = here
            if times is not None:
                times[first:last] = times[before] + automaton.accepting[here]
        alive = states != DEAD
        reached |= alive
        accepted |= automaton.accepting[states]
        return True

    def _with_byte(self, byte: int) -> NDArray[np.intp]:
        """All nodes that a byte leads to."""
        return self._by_byte[self._byte_at[byte] : self._byte_at[byte + 1]]

    def _expand(self, automaton: Automaton, states: NDArray[np.int32] | list[int]) -> None:
        known = automaton.expanded[states]
        if not known.all():
            for state in set(np.asarray(states)[~known].tolist()):
                automaton.expand(state)


def _is_wide(node: Node) -> bool:
    return node.kind == "concat" and node.args[0].kind in WIDE
