"""From one alternative of a JSON schema to its language: strings, numbers, arrays, objects."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from functools import reduce
from typing import Any

from .automaton import Automaton, ConstraintError, Node
from .exclusion import further_properties
from .json_text import JsonText
from .regex import Ranges, Tree, one_set, parse, searched
from .schema_parts import Bound, Part, refuse

__all__ = ["FORMATS", "PartNodes"]

_YEAR = r"([1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_DATE = (
    rf"{_YEAR}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    r"|\d\d(0[48]|[2468][048]|[13579][26])-02-29"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_URI_CHARACTER = r"([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"

# The formats that are kept, each as a pattern that holds only what is right; it may hold less than RFCs allow.
FORMATS = {
    "date": rf"^({_DATE})$",
    "time": rf"^{_TIME}$",
    "date-time": rf"^({_DATE})T{_TIME}$",
    "duration": r"^P(\d{1,9}W|\d{1,9}Y(\d{1,9}M(\d{1,9}D)?)?|\d{1,9}M(\d{1,9}D)?|\d{1,9}D"
    r"|T(\d{1,9}H(\d{1,9}M(\d{1,9}S)?)?|\d{1,9}M(\d{1,9}S)?|\d{1,9}S))$",
    "uuid": r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "ipv6": r"^([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL}){{0,3}}$",
    "email": rf"^[A-Za-z0-9_+-]{{1,30}}(\.[A-Za-z0-9_+-]{{1,30}}){{0,1}}@{_LABEL}(\.{_LABEL}){{1,3}}$",
    "uri": rf"^[A-Za-z][A-Za-z0-9+.-]*://{_LABEL}(\.{_LABEL}){{0,3}}(:\d{{1,4}})?(/{_URI_CHARACTER}*)*"
    rf"(\?({_URI_CHARACTER}|[/?])*)?(#({_URI_CHARACTER}|[/?])*)?$",
}
UNASSERTED = ("int32", "int64", "float", "double", "password", "byte", "binary")  # OpenAPI's, notes on a type


class PartNodes:
    """Makes languages of parts. schema: the language of a schema within, (schema, path) -> node."""

    def __init__(self, automaton: Automaton, json_text: JsonText, schema: Callable[[Any, str], Node]) -> None:
        self._a, self._json, self._schema = automaton, json_text, schema

    def node(self, part: Part) -> Node:
        """What a part allows. Raises ConstraintError for what cannot be kept."""
        if part.enum is not None:
            return self._chosen(part)
        if part == Part():
            return self._json.any_value(self._a.limits.nesting)
        types, found = part.types, []
        if "null" in types:
            found.append(self._json.null)
        if "boolean" in types:
            found.append(self._json.boolean)
        if "number" in types or "integer" in types:
            found.append(self._number(part))
        if "string" in types:
            found.append(self._string(part))
        if "array" in types:
            found.append(self._array(part))
        if "object" in types:
            found.append(self._object(part))
        return self._a.union(found)

    def _chosen(self, part: Part) -> Node:
        """The values of an enum that have all else that is asked for."""
        assert part.enum is not None
        rest = replace(part, enum=None)
        if rest == Part():
            return self._a.union([self._json.value(value) for value in part.enum])
        if rest.only_types():
            values = [value for value in part.enum if _type(value) in part.types]
            return self._a.union([self._json.value(value) for value in values])
        allowed = self.node(rest)
        values = [value for value in part.enum if self._a.matches(allowed, json.dumps(value).encode())]
        return self._a.union([self._json.value(value) for value in values])

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def _number(self, part: Part) -> Node:
        whole = "number" not in part.types or part.multiple is not None
        if not whole:
            if part.low is None and part.high is None:
                return self._json.number
            return self._json.number_within(part.low, part.high)
        language = self._json.integer_within(_inside(part.low, up=True), _inside(part.high, up=False))
        if part.multiple is not None:
            minus = self._a.optional(self._a.literal(b"-"))
            language = self._a.both(language, self._a.concat(minus, self._a.multiple(part.multiple)))
        return language

    # ---- strings ---------------------------------------------------------------------------------------------------

    def _string(self, part: Part) -> Node:
        if not part.patterns and not part.formats:
            return (
                self._json.string if part.length == (0, None) else self._json.string_of(self._json.length(*part.length))
            )
        return self._json.string_of(self._content(part))

    def _content(self, part: Part) -> Node:
        if len(part.patterns) == 1 and not part.formats:
            found = one_set(self._parsed(part.patterns[0], part.path, "pattern"))
            if found:
                return self._counted(*found, part)
        contents = [self._pattern(pattern, part.path, "pattern") for pattern in part.patterns]
        for name in part.formats:
            if name in FORMATS:
                contents.append(self._pattern(FORMATS[name], part.path, "format"))
            elif name not in UNASSERTED:
                raise refuse(part.path, "format", f"expected one of {', '.join(FORMATS)}, got {name[:40]!r}")
        if part.length != (0, None) or not contents:
            contents.append(self._json.length(*part.length))
        return reduce(self._a.both, contents)

    def _pattern(self, pattern: str, path: str, keyword: str, wide: bool = False) -> Node:
        """The content of a string in which a pattern is found."""
        tree, any_text = self._parsed(pattern, path, keyword, wide), self._a.repeat(self._json.character)
        try:
            return searched(self._a, tree, lambda r: self._json.characters(r, every_escape=wide), any_text, wide)
        except ConstraintError as e:
            raise type(e)(f"json schema: {path}: {keyword}: {e}") from None

    def _parsed(self, pattern: str, path: str, keyword: str, wide: bool = False) -> Tree:
        try:
            return parse(pattern, self._a.limits, search=True, wide=wide)
        except ConstraintError as e:
            raise type(e)(f"json schema: {path}: {keyword}: {e}") from None

    def _counted(self, ranges: Ranges, least: int, most: int | None, part: Part) -> Node:
        """A pattern of one set of characters, with the limits on the length put into its counts."""
        low, high = part.length
        low, high = max(low, least), most if high is None else high if most is None else min(high, most)
        if high is not None and low > high:
            return self._a.nothing
        return self._a.repeat(self._json.characters(ranges), low, high)

    # ---- arrays ----------------------------------------------------------------------------------------------------

    def _array(self, part: Part) -> Node:
        a, (least, most) = self._a, part.size
        item = self._schema(True if part.items is None else part.items, f"{part.path}/items")
        prefix = [self._schema(one, f"{part.path}/prefixItems/{i}") for i, one in enumerate(part.prefix)]
        prefix = prefix[:most]
        first = len(prefix)  # the first item that is not in the prefix
        more = None if most is None else most - first
        if first:
            tail = a.repeat(a.concat(self._json.comma, item), max(least - first, 0), more)
        elif more == 0:
            tail = a.empty if least == 0 else a.nothing
        else:
            rest = a.repeat(a.concat(self._json.comma, item), max(least - 1, 0), None if more is None else more - 1)
            tail = a.concat(item, rest) if least else a.optional(a.concat(item, rest))
        tail = a.nothing if more is not None and max(least - first, 0) > more else tail
        tail = a.concat(tail, a.literal(b"]"))
        for i in reversed(range(first)):
            one = a.concat(self._json.comma if i else a.empty, a.concat(prefix[i], tail))
            tail = one if i < least else a.union([a.literal(b"]"), one])
        return a.concat(a.literal(b"["), tail)

    # ---- objects ---------------------------------------------------------------------------------------------------

    def _object(self, part: Part) -> Node:
        """Declared properties in order, then others; how many there are already is counted as far as it matters."""
        a, (least, most) = self._a, part.count
        entries = self._entries(part)
        if sum([needed for _, _, needed in entries]) > (math.inf if most is None else most):
            return a.nothing
        names = dict.fromkeys([*part.properties, *part.required])
        pair = self._further(part, list(names))
        most = None if most is not None and pair is a.nothing and most >= len(entries) else most
        cap = max(1, least, -1 if most is None else most + 1)
        tails = [self._end(pair, count, least, most) for count in range(cap + 1)]
        for name, value, needed in reversed(entries):
            before = tails
            tails = []
            for count in range(cap + 1):
                comma = self._json.comma if count else a.empty
                key = a.concat(comma, self._json.value(name), self._json.colon)
                there = a.concat(key, a.concat(value, before[min(count + 1, cap)]))
                tails.append(there if needed else a.union([there, before[count]]))
        return a.concat(a.literal(b"{"), tails[0])

    def _entries(self, part: Part) -> list[tuple[str, Node, bool]]:
        """(name, language of the value, whether it must be there) of each declared property that may be."""
        entries = []
        for name in dict.fromkeys([*part.properties, *part.required]):
            text = json.dumps(name).encode()
            schemas = [part.properties[name]] if name in part.properties else []
            for pattern, schema in part.pattern_properties.items():
                narrow, wide = (self._json.string_of(self._pattern(pattern, part.path, "patternProperties", w))
                                for w in (False, True))  # fmt: skip
                if self._a.matches(narrow, text):
                    schemas.append(schema)
                elif self._a.matches(wide, text):
                    raise refuse(part.path, "patternProperties", f"dialects disagree whether {pattern!r} has {name!r}")
            if not schemas:
                schemas = [True if part.additional is None else part.additional]
            value = self._schema(
                schemas[0] if len(schemas) == 1 else {"allOf": schemas}, f"{part.path}/properties/{name}"
            )
            if not all([self._a.matches(self._name(schema, part.path), text) for schema in part.names]):
                value = self._a.nothing
            if value is not self._a.nothing or name in part.required:
                entries.append((name, value, name in part.required))
        return entries

    def _name(self, schema: Any, path: str) -> Node:
        return self._schema({"allOf": [{"type": "string"}, schema]}, f"{path}/propertyNames")

    def _further(self, part: Part, names: list[str]) -> Node:
        """ "name": value of a property that is not declared; nothing where none may be."""
        a, rest = self._a, further_properties(part)
        if rest is None and not part.pattern_properties:
            return a.nothing
        allowed = [self._name(schema, part.path) for schema in part.names]
        declared = a.union([self._json.spelled(name) for name in names])
        keys = reduce(a.both, [self._json.string, *allowed])
        keys = keys if declared is a.nothing else a.both(keys, a.complement(declared))
        patterns = list(part.pattern_properties)
        wide = [self._json.string_of(self._pattern(p, part.path, "patternProperties", wide=True)) for p in patterns]
        found = []
        for i, (pattern, schema) in enumerate(part.pattern_properties.items()):
            own = a.both(keys, self._json.string_of(self._pattern(pattern, part.path, "patternProperties")))
            others = [w for j, w in enumerate(wide) if j != i]
            own = a.both(own, a.complement(a.union(others))) if others else own
            found.append(self._pair(own, self._schema(schema, f"{part.path}/patternProperties/{pattern}")))
        if rest is not None:
            own = a.both(keys, a.complement(a.union(wide))) if wide else keys
            found.append(self._pair(own, self._schema(rest, f"{part.path}/additionalProperties")))
        return a.union(found)

    def _pair(self, key: Node, value: Node) -> Node:
        return self._a.concat(key, self._a.concat(self._json.colon, value))

    def _end(self, pair: Node, count: int, least: int, most: int | None) -> Node:
        """What may stand behind the declared properties when there are `count` of them."""
        a = self._a
        need, room = max(least - count, 0), None if most is None else most - count
        # Two further properties may have the same name, and count once: no more than one can be promised.
        if (room is not None and (room < 0 or need > room)) or need > 1:
            return a.nothing
        more = a.concat(self._json.comma, pair)
        if count:
            pairs = a.repeat(more, need, room)
        elif room == 0:
            pairs = a.empty
        else:
            pairs = a.concat(pair, a.repeat(more, 0, None if room is None else room - 1))
            pairs = pairs if need else a.optional(pairs)
        return a.concat(pairs, a.literal(b"}"))


def _inside(bound: Bound | None, up: bool) -> int | None:
    """The integer nearest to a bound that is within it."""
    if bound is None:
        return None
    value, strict = bound
    whole = math.ceil(value) if up else math.floor(value)
    return whole + (1 if up else -1) if strict and Decimal(whole) == value else whole


def _type(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "object"
