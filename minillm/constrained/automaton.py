"""Regular languages over bytes, and the automaton that walks them, made as far as somebody walks.

A language is a `Node`: a set of bytes, a literal, or one made of others. What may follow a byte is again a language,
its derivative:

    after a, (ab)* leaves b(ab)*            after b, nothing of it is left

So a state of the automaton *is* a node, its transitions are the derivatives, and it accepts where the empty string is
in the language. Nothing is built before it is visited: [a-z]{0,1000} costs as much as [a-z]. Intersection and
complement come for free, which a construction by NFA does not have, and counting costs no copies.

A node that holds no string at all is always `nothing`, so that no transition leads into a dead end. For most kinds
that follows from how they are made; an intersection or a complement is searched for a string that it accepts.

One `Automaton` belongs to one request: it owns nodes, states and the budgets that end a hostile request early.

Sources: Brzozowski, 1964, "Derivatives of Regular Expressions"; Owens, Reppy and Turon, 2009, "Regular-expression
derivatives re-examined".
"""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEAD", "Automaton", "ConstraintError", "ConstraintTooLarge", "Limits", "Node", "byte_set"]

DEAD = 0  # the state from which nothing is accepted
ALL_BYTES = (1 << 256) - 1
DIGITS = [1 << (ord("0") + d) for d in range(10)]

Moves = tuple[tuple[int, "Node"], ...]


class ConstraintError(ValueError):
    """A constraint that cannot be kept; the message says which part of it, and why."""


class ConstraintTooLarge(ConstraintError):
    """A constraint that needs more than its `Limits`."""


@dataclass(frozen=True)
class Limits:
    """What one constraint may cost.

    - source: characters of a regular expression, or of a schema as JSON, or of all choices.
    - depth: groups within groups of a regular expression, schemas within schemas.
    - positions: letters of a regular expression with its repeats written out: (ab){20} has 40. A count within a count
      weighs tenfold.
    - nodes, states, seconds of one core: what may be made of it, while it is compiled and later while it is walked.
    - nesting: of arrays and objects where a schema allows any JSON.
    - recursion: how often a `$ref` may stand within a `$ref`.
    """

    source: int = 200_000
    depth: int = 64
    positions: int = 100_000
    nodes: int = 300_000
    states: int = 10_000
    seconds: float = 2.0
    nesting: int = 6
    recursion: int = 12


class Node:
    """A language. Two of one automaton with the same parts are the same object; `digest` is equal in any automaton."""

    __slots__ = ("alive", "args", "digest", "kind", "moves", "nullable")

    def __init__(self, kind: str, args: tuple[Any, ...], nullable: bool, digest: bytes) -> None:
        self.kind, self.args, self.nullable, self.digest = kind, args, nullable, digest
        self.moves: Moves | None = None  # what may follow, once asked for
        self.alive: bool | None = None  # whether it holds a string, once asked for

    def __repr__(self) -> str:
        return f"{self.kind}{self.args!r}"


def byte_set(*ranges: tuple[int, int]) -> int:
    """Bytes as the bits of an integer, from (first, last) pairs."""
    bits = 0
    for first, last in ranges:
        bits |= (1 << (last + 1)) - (1 << first)
    return bits


@lru_cache(4096)
def _members(bits: int) -> NDArray[np.intp]:
    """The bytes of a set, int [n]."""
    octets = np.frombuffer(bits.to_bytes(32, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(octets, bitorder="little"))


class Automaton:
    """Makes nodes, and numbers those that are walked as states; `table` and `accepting` are for walks in NumPy.

    table: int32 [capacity, 256], the next state; a row holds only once `expand` was called for its state.
    accepting: bool [capacity]. Every method that makes something raises ConstraintTooLarge beyond the limits.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._made: dict[tuple[Any, ...], Node] = {}
        self._spent = 0.0
        self._deadline: float | None = None
        self.nothing = self._node("bytes", (0,), False)
        self.empty = self._node("literal", (b"",), True)
        self.everything = self._node("not", (self.nothing,), True)
        self.nodes: list[Node] = [self.nothing]  # of each state
        self._states: dict[Node, int] = {self.nothing: DEAD}
        self.table: NDArray[np.int32] = np.zeros((16, 256), np.int32)
        self.accepting: NDArray[np.bool_] = np.zeros(16, np.bool_)
        self.expanded: NDArray[np.bool_] = np.zeros(16, np.bool_)
        self.expanded[DEAD] = True

    # ---- making languages ------------------------------------------------------------------------------------------

    def byte(self, bits: int) -> Node:
        """One byte of a set."""
        return self._node("bytes", (bits,), False)

    def literal(self, text: bytes) -> Node:
        """Exactly these bytes."""
        return self._node("literal", (text,), not text)

    def concat(self, *nodes: Node) -> Node:
        """One behind another. (a b) c is not made a (b c): that a string is one piece is what masks live on."""
        result = self.empty
        for node in reversed(nodes):
            result = self._concat(node, result)
        return result

    def _concat(self, a: Node, b: Node) -> Node:
        if a is self.nothing or b is self.nothing:
            return self.nothing
        if a is self.empty or b is self.empty:
            return b if a is self.empty else a
        if a.kind == b.kind == "literal":
            return self.literal(a.args[0] + b.args[0])
        return self._node("concat", (a, b), a.nullable and b.nullable)

    def union(self, nodes: Iterable[Node]) -> Node:
        """Any of them. What begins alike is put together: a b | a c is a (b | c)."""
        bits, tails = 0, {}  # type: int, dict[Node, dict[Node, None]]
        for node in self._flat(nodes):
            if node.kind == "bytes":
                bits |= node.args[0]
                continue
            head, tail = node.args if node.kind == "concat" else (node, self.empty)
            tails.setdefault(head, {})[tail] = None
        if self.everything in tails and self.empty in tails[self.everything]:
            return self.everything
        members = [self._concat(head, self.union(each) if len(each) > 1 else next(iter(each)))
                   for head, each in tails.items()]  # fmt: skip
        members += [self.byte(bits)] if bits else []
        if len(members) < 2:
            return members[0] if members else self.nothing
        members.sort(key=lambda node: node.digest)
        return self._node("union", tuple(members), any([node.nullable for node in members]))

    def _flat(self, nodes: Iterable[Node]) -> Iterable[Node]:
        for node in nodes:
            yield from node.args if node.kind == "union" else (node,)

    def optional(self, node: Node) -> Node:
        """It, or the empty string."""
        return self.union([self.empty, node])

    def repeat(self, node: Node, least: int = 0, most: int | None = None) -> Node:
        """It `least` to `most` times, one behind another; None is without end, and `least` above `most` is nothing."""
        if most is not None and least > most:
            return self.nothing
        if most == 0 or node in (self.empty, self.nothing):
            return self.nothing if least and node is self.nothing else self.empty
        least = 0 if node.nullable else least
        if most == 1:
            return node if least else self.optional(node)
        if node.kind == "repeat" and node.args[1:] == (0, None):
            return node
        return self._node("repeat", (node, least, most), least == 0)

    def both(self, a: Node, b: Node) -> Node:
        """What is in both."""
        node = self._both(a, b)
        return node if self._alive(node) else self.nothing

    def _both(self, a: Node, b: Node) -> Node:
        if a is b or b is self.everything:
            return a
        if a is self.everything:
            return b
        if self.nothing in (a, b):
            return self.nothing
        first, second = sorted((a, b), key=lambda node: node.digest)
        return self._node("and", (first, second), a.nullable and b.nullable)

    def complement(self, node: Node) -> Node:
        """All strings of bytes that are not in it."""
        result = self._complement(node)
        return result if self._alive(result) else self.nothing

    def _complement(self, node: Node) -> Node:
        return node.args[0] if node.kind == "not" else self._node("not", (node,), not node.nullable)

    def multiple(self, of: int, rest: int = 0) -> Node:
        """Decimal digits, any number of them, whose number behind `rest` is a multiple; "" and 00 are."""
        return self._node("multiple", (of, rest), rest == 0)

    def _node(self, kind: str, args: tuple[Any, ...], nullable: bool) -> Node:
        key = (kind, *args)
        node = self._made.get(key)
        if node is None:
            if len(self._made) >= self.limits.nodes:
                raise ConstraintTooLarge(f"constraint: needs more than {self.limits.nodes} parts; make it simpler")
            if self._deadline is not None and len(self._made) % 64 == 0 and time.thread_time() > self._deadline:
                raise ConstraintTooLarge(f"constraint: took more than {self.limits.seconds} s; make it simpler")
            parts = [part.digest if isinstance(part, Node) else repr(part).encode() for part in args]
            digest = hashlib.blake2b(b"\0".join([kind.encode(), *parts]), digest_size=16).digest()
            node = self._made[key] = Node(kind, args, nullable, digest)
        return node

    # ---- derivatives -----------------------------------------------------------------------------------------------

    def moves(self, node: Node) -> Moves:
        """What may follow: disjoint sets of bytes, none empty, each with the language that is left behind them."""
        if node.moves is None:
            found = self._moves(node)
            node.moves = tuple([(bits, after) for bits, after in found if self._alive(after)])
        return node.moves

    def _moves(self, node: Node) -> Sequence[tuple[int, Node]]:
        kind, args = node.kind, node.args
        if kind == "bytes":
            return [(args[0], self.empty)] if args[0] else []
        if kind == "literal":
            return [(1 << args[0][0], self.literal(args[0][1:]))] if args[0] else []
        if kind == "concat":
            first = [(bits, self._concat(after, args[1])) for bits, after in self.moves(args[0])]
            return self._merge([first, self.moves(args[1])]) if args[0].nullable else first
        if kind == "union":
            return self._merge([self.moves(member) for member in args])
        if kind == "repeat":
            body, least, most = args
            rest = self.repeat(body, max(least - 1, 0), None if most is None else most - 1)
            return [(bits, self._concat(after, rest)) for bits, after in self.moves(body)]
        if kind == "and":
            return [
                (common, self._both(a, b))
                for bits, a in self.moves(args[0]) for other, b in self.moves(args[1]) if (common := bits & other)
            ]  # fmt: skip
        if kind == "not":
            inner = self.moves(args[0])
            rest_bits = ALL_BYTES & ~sum([bits for bits, _ in inner])  # they are disjoint
            return [*[(bits, self._complement(after)) for bits, after in inner], (rest_bits, self.everything)]
        of, rest_value = args
        return [(DIGITS[d], self.multiple(of, (10 * rest_value + d) % of)) for d in range(10)]

    def _merge(self, sources: Sequence[Sequence[tuple[int, Node]]]) -> Sequence[tuple[int, Node]]:
        """The moves of a union: where two sets of bytes overlap, both languages are left."""
        parts: list[tuple[int, list[Node]]] = []
        for bits, node in [move for source in sources for move in source]:
            split = []
            for other, nodes in parts:
                common = bits & other
                if common:
                    split.append((common, [*nodes, node]))
                    bits &= ~common
                if other & ~common:
                    split.append((other & ~common, nodes))
            parts = [*split, (bits, [node])] if bits else split
        return [(bits, self.union(nodes) if len(nodes) > 1 else nodes[0]) for bits, nodes in parts]

    def _alive(self, node: Node) -> bool:
        """Whether the language holds a string. Only intersections and complements must be searched."""
        if node.alive is not None:
            return node.alive
        if node.kind not in ("and", "not"):
            node.alive = node is not self.nothing
            return node.alive
        came_from: dict[Node, Node | None] = {node: None}
        stack = [node]
        while stack:
            found = stack.pop()
            if found.nullable or found.alive or (found.kind not in ("and", "not") and found is not self.nothing):
                at: Node | None = found
                while at is not None:
                    at.alive, at = True, came_from[at]
                return True
            for bits, after in self._moves(found) if found.alive is None else ():
                if bits and after not in came_from:
                    came_from[after] = found
                    stack.append(after)
        for dead in came_from:
            dead.alive = False
        return False

    # ---- states ----------------------------------------------------------------------------------------------------

    def state(self, node: Node) -> int:
        """The number of a node's state."""
        number = self._states.get(node)
        if number is None:
            number = len(self.nodes)
            if number > self.limits.states:
                raise ConstraintTooLarge(f"constraint: needs more than {self.limits.states} states; make it simpler")
            if number == len(self.table):
                self.table = np.concatenate([self.table, np.zeros_like(self.table)])
                self.accepting = np.concatenate([self.accepting, np.zeros_like(self.accepting)])
                self.expanded = np.concatenate([self.expanded, np.zeros_like(self.expanded)])
            self._states[node] = number
            self.nodes.append(node)
            self.accepting[number] = node.nullable
        return number

    def expand(self, state: int) -> None:
        """Make the state's row of the table."""
        if self.expanded[state]:
            return
        with self.timed():
            for bits, after in self.moves(self.nodes[state]):
                number = self.state(after)  # may move the table
                self.table[state, _members(bits)] = number
            self.expanded[state] = True

    def walk(self, state: int, text: bytes) -> int:
        """The state behind some bytes; DEAD when they fit nowhere."""
        for byte in text:
            if not self.expanded[state]:
                self.expand(state)
            state = int(self.table[state, byte])
            if state == DEAD:
                break
        return state

    def matches(self, node: Node, text: bytes) -> bool:
        """Whether the language holds `text`."""
        return self.nodes[self.walk(self.state(node), text)].nullable

    def timed(self) -> "_Clock":
        """`with automaton.timed():` counts the time inside, and what is too deep for Python's stack, by the limits."""
        return _Clock(self)

    def start_clock(self) -> float | None:
        """When the work that begins now began; None where somebody outside measures already."""
        if self._deadline is not None:
            return None
        began = time.thread_time()
        self._deadline = began + self.limits.seconds - self._spent
        return began

    def stop_clock(self, began: float | None) -> None:
        """The end of what `start_clock` began."""
        if began is not None:
            self._spent += time.thread_time() - began
            self._deadline = None


class _Clock:
    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton

    def __enter__(self) -> None:
        self._began = self._automaton.start_clock()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._automaton.stop_clock(self._began)
        if isinstance(error, RecursionError):
            raise ConstraintTooLarge("constraint: nested too deeply; make it simpler") from None
