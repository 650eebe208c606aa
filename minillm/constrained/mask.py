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
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .automaton import Automaton, ConstraintError, Node

__all__ = ["ByteTokens", "NoTokenFits", "Vocabulary"]

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
            array.flags.writeable = False
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
        cache_bytes: int = 64_000_000,
    ) -> None:
        self.size = len(tokens) if size is None else size
        if self.size < len(tokens):
            raise ValueError(f"size: expected at least the {len(tokens)} tokens, got {size}")
        if bad := [i for i in end_ids if not 0 <= i < self.size]:
            raise ValueError(f"end_ids: expected ids in 0..{self.size - 1}, got {bad[0]}")
        self.end_ids = np.array(sorted(set(end_ids)), np.intp)
        ends = set(end_ids)
        self.tokens = [None if i in ends else token or None for i, token in enumerate(tokens)]
        self._build(self.tokens)
        self._masks, self._walks = _Kept(cache_bytes // 2), _Kept(cache_bytes // 2)

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
        for depth in range(int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > depth)
            edges, which = np.unique(at[longer] * 256 + text[offsets[longer] + depth], return_inverse=True)
            at[longer] = count + which
            parents.append(edges // 256)
            node_bytes.append((edges % 256).astype(np.uint8))
            count += len(edges)
        self.node_byte, self.parent = np.concatenate(node_bytes), np.concatenate(parents)
        self.children = np.bincount(self.parent[1:], minlength=count)
        self.first_child = 1 + np.cumsum(self.children) - self.children
        self._by_byte = 1 + np.argsort(
            self.node_byte[1:], kind="stable"
        )  # nodes of byte b, from _byte_at[b] to _byte_at[b + 1]
        self._byte_at = np.searchsorted(self.node_byte[self._by_byte], np.arange(257))
        self.end_node = np.full(self.size, count)
        self.end_node[ids] = at
        self._nodes = count

    # ---- masks -----------------------------------------------------------------------------------------------------

    def mask(self, automaton: Automaton, state: int) -> Mask:
        """The tokens that may come in a state: bool [size], read-only. End tokens may where the automaton accepts.

        Raises NoTokenFits when there is none, ConstraintTooLarge beyond the automaton's limits.
        """
        node = automaton.nodes[state]
        return self._masks.get(node.digest, lambda: (self._make_mask(automaton, node),))[0]

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
        """Nodes of the trie where the automaton is alive, and those where it accepts, each bool [N + 1]."""
        if node.kind == "repeat" and node.args[1:] != (0, None) and self._counts(automaton, node.args[0]):
            return self._counted(automaton, *node.args)
        reached, accepted = np.zeros((2, self._nodes + 1), np.bool_)
        if node.kind == "concat" and node.args[0].kind in WIDE:
            head, tail = node.args
            inside, exits, *_ = self._walks.get(head.digest, lambda: self._reach(automaton, head))
            reached |= inside
            self._walk(automaton, automaton.state(tail), np.flatnonzero(exits[:-1]), reached, accepted)
        else:
            self._walk(automaton, automaton.state(node), np.zeros(1, np.intp), reached, accepted)
        reached[0] = False  # an empty token is none
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
            reached, accepted = np.zeros((2, self._nodes + 1), np.bool_)
            times = np.zeros(self._nodes + 1, np.int32)
            self._walk(automaton, automaton.state(star), np.zeros(1, np.intp), reached, accepted, times)
            reached[0] = False
            return reached, accepted, times

        reached, accepted, times = self._walks.get(b"counted" + star.digest, walk)
        within = reached & (times + ~accepted <= (most if most is not None else times.max()))
        return within, accepted & (times >= least) & (times <= (most if most is not None else times.max()))

    def _walk(
        self,
        automaton: Automaton,
        state: int,
        nodes: NDArray[np.intp],
        reached: Mask,
        accepted: Mask,
        times: NDArray[np.int32] | None = None,
    ) -> None:
        """Go from some nodes of the trie, all in one state, as deep as the automaton lives.

        Marks the nodes that are `reached`, and those where it is `accepted`; counts how often it accepted on the way.
        """
        states = np.full(len(nodes), state, np.int32)
        accepted[nodes] |= automaton.accepting[state]
        while len(nodes):
            self._expand(automaton, states)
            live = np.flatnonzero(automaton.table[state]) if len(nodes) > FEW and (states == state).all() else None
            if live is not None and len(live) <= FEW_BYTES:  # quicker to ask all nodes of these bytes for their parents
                child, came = self._with_bytes(live, nodes)
                states = automaton.table[state, self.node_byte[child]]
            else:
                counts = self.children[nodes]
                came = np.repeat(nodes, counts)
                ahead = np.cumsum(counts) - counts  # children of the nodes in front
                child = np.arange(len(came)) + np.repeat(self.first_child[nodes] - ahead, counts)
                states = automaton.table[np.repeat(states, counts), self.node_byte[child]]
                alive = np.flatnonzero(states)
                child, states, came = child[alive], states[alive], came[alive]
            reached[child] = True
            accepts = automaton.accepting[states]
            accepted[child[accepts]] = True
            if times is not None:
                times[child] = times[came] + accepts
            nodes = child

    def _with_bytes(self, live: NDArray[np.intp], nodes: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The children of `nodes` that have one of some bytes, and their parents."""
        child = np.concatenate([self._by_byte[self._byte_at[byte] : self._byte_at[byte + 1]] for byte in live])
        wanted = np.zeros(self._nodes, np.bool_)
        wanted[nodes] = True
        parents = self.parent[child]
        chosen = wanted[parents]
        return child[chosen], parents[chosen]

    def _expand(self, automaton: Automaton, states: NDArray[np.int32]) -> None:
        missing = states[~automaton.expanded[states]]
        for state in set(missing.tolist()):
            automaton.expand(state)
