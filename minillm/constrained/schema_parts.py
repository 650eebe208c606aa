"""One alternative of a JSON schema, all that it asks for side by side; what `allOf` and `$ref` say is merged in."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from .automaton import ConstraintError

__all__ = ["TYPES", "Bound", "Part", "canonical", "merge", "read_keywords", "refuse"]

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ALL_TYPES = frozenset(TYPES)
Bound = tuple[Decimal, bool]  # and whether it is left out itself
Sizes = tuple[int, int | None]

# Of any draft of JSON schema; each asserts something that is not kept here.
REFUSED = (
    "contains", "minContains", "maxContains", "$dynamicRef", "$recursiveRef", "extends", "disallow",
    "divisibleBy",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one alternative asks for; the defaults ask for nothing. Schemas within it are still to be read."""

    path: str = field(default="#", compare=False)
    depth: int = field(default=0, compare=False)  # how many more $ref may be followed in the schemas within
    types: frozenset[str] = ALL_TYPES
    enum: tuple[Any, ...] | None = None
    low: Bound | None = None
    high: Bound | None = None
    multiple: int | None = None
    length: Sizes = (0, None)
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    properties: dict[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    pattern_properties: dict[str, Any] = field(default_factory=dict)
    additional: Any = None  # None: nothing was said
    names: tuple[Any, ...] = ()  # schemas of propertyNames
    count: Sizes = (0, None)  # of properties
    prefix: tuple[Any, ...] = ()
    items: Any = None
    size: Sizes = (0, None)  # of an array

    def only_types(self) -> bool:
        """Whether nothing but the type is asked for."""
        return self == Part(types=self.types)


def refuse(path: str, keyword: str, why: str) -> ConstraintError:
    """The error for what a schema asks and is not kept."""
    return ConstraintError(f"json schema: {path}: {keyword}: {why}")


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_keywords(schema: dict[str, Any], path: str, depth: int, outer: bool = False) -> Part:
    """The keywords of one schema that say something about a value itself, not by way of other schemas.

    outer: what is not kept is passed over, so that the part allows more than the schema does.
    Raises ConstraintError that names the keyword and its path.
    """
    if not outer:
        for keyword in REFUSED:
            if keyword in schema:
                raise refuse(path, keyword, "is not supported")
        if schema.get("uniqueItems") is True and schema.get("maxItems", 2) not in (0, 1):
            raise refuse(path, "uniqueItems", "is not supported")
    strings: dict[str, Any] = {
        "patterns": _strings(schema, "pattern", path),
        "formats": _strings(schema, "format", path),
    }
    low, high = _bounds(schema, path)
    return Part(
        path=path, depth=depth, types=_types(schema, path), enum=_enum(schema, path), low=low, high=high,
        multiple=_multiple(schema, path, outer), length=_sizes(schema, "Length", path),
        count=_sizes(schema, "Properties", path), size=_sizes(schema, "Items", path),
        **strings, **_object_keywords(schema, path), **_array_keywords(schema, path, outer),
    )  # fmt: skip


def _expect(schema: dict[str, Any], keyword: str, kind: Any, expected: str, path: str) -> Any:
    value = schema[keyword]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool and bool not in _kinds(kind)):
        raise refuse(path, keyword, f"expected {expected}, got {json.dumps(value)[:60]}")
    return value


def _kinds(kind: Any) -> tuple[Any, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


def _types(schema: dict[str, Any], path: str) -> frozenset[str]:
    if "type" not in schema:
        return ALL_TYPES
    found = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    for one in found:
        if one not in TYPES:
            raise refuse(path, "type", f"expected some of {', '.join(TYPES)}, got {json.dumps(one)[:60]}")
    return frozenset(found) | ({"integer"} if "number" in found else set())


def _enum(schema: dict[str, Any], path: str) -> tuple[Any, ...] | None:
    found = None
    if "enum" in schema:
        found = tuple(_expect(schema, "enum", list, "an array", path))
    if "const" in schema:
        one = (schema["const"],)
        found = one if found is None else _common(found, one)
    return found


def _strings(schema: dict[str, Any], keyword: str, path: str) -> tuple[str, ...]:
    return (_expect(schema, keyword, str, "a string", path),) if keyword in schema else ()


def _sizes(schema: dict[str, Any], what: str, path: str) -> Sizes:
    found: list[int | None] = []
    for keyword in (f"min{what}", f"max{what}"):
        value = _expect(schema, keyword, (int, float), "a number", path) if keyword in schema else None
        if value is not None and (value != int(value) or value < 0):
            raise refuse(path, keyword, f"expected an integer of 0 or more, got {value}")
        found.append(None if value is None else int(value))
    return found[0] or 0, found[1]


def _bounds(schema: dict[str, Any], path: str) -> tuple[Bound | None, Bound | None]:
    found: list[Bound | None] = []
    for inclusive, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        bounds: list[Bound] = []
        strict = schema.get(exclusive) is True  # draft 4: it says how `minimum` is meant
        if inclusive in schema:
            bounds.append((_decimal(schema, inclusive, path), strict))
        if exclusive in schema and not isinstance(schema[exclusive], bool):
            bounds.append((_decimal(schema, exclusive, path), True))
        pick = _higher if inclusive == "minimum" else _lower
        found.append(pick(bounds[0], bounds[-1]) if bounds else None)
    return found[0], found[1]


def _decimal(schema: dict[str, Any], keyword: str, path: str) -> Decimal:
    value = Decimal(repr(_expect(schema, keyword, (int, float), "a number", path)))
    if abs(value) > 10**40 or (value and abs(value) < Decimal("1e-40")):
        raise refuse(path, keyword, f"expected a number that can be written without an exponent, got {value}")
    return value


def _multiple(schema: dict[str, Any], path: str, outer: bool) -> int | None:
    if "multipleOf" not in schema:
        return None
    value = _expect(schema, "multipleOf", (int, float), "a number", path)
    if value <= 0 or value != int(value):
        if outer:
            return None
        raise refuse(path, "multipleOf", f"expected an integer, got {value}: of fractions it depends on rounding")
    return int(value)


def _object_keywords(schema: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for keyword, name in (("properties", "properties"), ("patternProperties", "pattern_properties")):
        if keyword in schema:
            found[name] = dict(_expect(schema, keyword, dict, "an object", path))
    if "required" in schema:
        required = _expect(schema, "required", list, "an array of names", path)
        if not all([isinstance(name, str) for name in required]):
            raise refuse(path, "required", "expected an array of names")
        found["required"] = tuple(dict.fromkeys(required))
    if "additionalProperties" in schema:
        found["additional"] = _expect(schema, "additionalProperties", (dict, bool), "a schema", path)
    if "propertyNames" in schema:
        found["names"] = (_expect(schema, "propertyNames", (dict, bool), "a schema", path),)
    return found


def _array_keywords(schema: dict[str, Any], path: str, outer: bool) -> dict[str, Any]:
    if isinstance(schema.get("items"), list):  # up to draft 2019
        rest = schema.get("additionalItems")
        return {"prefix": tuple(schema["items"]), "items": rest}
    found: dict[str, Any] = {}
    if "prefixItems" in schema:
        found["prefix"] = tuple(_expect(schema, "prefixItems", list, "an array", path))
    if "items" in schema:
        found["items"] = _expect(schema, "items", (dict, bool), "a schema", path)
    return found


# ---- both of two -----------------------------------------------------------------------------------------------------


def merge(a: Part, b: Part, outer: bool = False) -> Part:
    """What both ask for, together. Raises ConstraintError where that cannot be said in one part."""
    return replace(
        a, depth=min(a.depth, b.depth),
        types=a.types & b.types, enum=_either(a.enum, b.enum, _common), low=_either(a.low, b.low, _higher),
        high=_either(a.high, b.high, _lower), multiple=_either(a.multiple, b.multiple, math.lcm),
        length=_narrower(a.length, b.length), count=_narrower(a.count, b.count), size=_narrower(a.size, b.size),
        patterns=tuple(dict.fromkeys(a.patterns + b.patterns)), formats=tuple(dict.fromkeys(a.formats + b.formats)),
        required=tuple(dict.fromkeys(a.required + b.required)), names=a.names + b.names,
        **_merged_objects(a, b, outer), **_merged_arrays(a, b),
    )  # fmt: skip


def _merged_objects(a: Part, b: Part, outer: bool) -> dict[str, Any]:
    declares = [bool(p.properties or p.pattern_properties or p.additional is not None) for p in (a, b)]
    if not all(declares):
        one = b if declares[1] else a
        return {
            "properties": one.properties,
            "pattern_properties": one.pattern_properties,
            "additional": one.additional,
        }
    if a.pattern_properties or b.pattern_properties:
        if not outer:
            raise refuse(b.path, "patternProperties", "is not supported beside properties of another schema in allOf")
        return {}
    names = dict.fromkeys([*a.properties, *b.properties])
    return {
        "properties": {n: _all_of(a.properties.get(n, a.additional), b.properties.get(n, b.additional)) for n in names},
        "additional": _all_of(a.additional, b.additional),
    }


def _merged_arrays(a: Part, b: Part) -> dict[str, Any]:
    length = max(len(a.prefix), len(b.prefix))
    at = [[p.prefix[i] if i < len(p.prefix) else p.items for i in range(length)] for p in (a, b)]
    prefix = [_all_of(x, y) for x, y in zip(*at, strict=True)]
    return {"prefix": tuple([True if x is None else x for x in prefix]), "items": _all_of(a.items, b.items)}


def _all_of(a: Any, b: Any) -> Any:
    """Both schemas; None is one that was not given."""
    if a is None or b is None or a is b:  # not ==: 1 == True
        return b if a is None else a
    if a is True or b is True:
        return b if a is True else a
    return {"allOf": [a, b]}


def _either(a: Any, b: Any, pick: Any) -> Any:
    return (b if a is None else a) if a is None or b is None else pick(a, b)


def _common(a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, ...]:
    texts = {canonical(value) for value in b}
    return tuple([value for value in a if canonical(value) in texts])


def canonical(value: Any) -> str:
    """The same text for JSON values that are equal: 1 and 1.0 are, 1 and true are not."""
    return json.dumps(_integral(value), sort_keys=True)


def _integral(value: Any) -> Any:
    if isinstance(value, list):
        return [_integral(item) for item in value]
    if isinstance(value, dict):
        return {name: _integral(item) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _higher(a: Bound, b: Bound) -> Bound:
    return max(a, b)


def _lower(a: Bound, b: Bound) -> Bound:
    return a if (a[0], not a[1]) < (b[0], not b[1]) else b


def _narrower(a: Sizes, b: Sizes) -> Sizes:
    return max(a[0], b[0]), _either(a[1], b[1], min)
