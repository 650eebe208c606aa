"""A JSON schema as a language: whatever it accepts is valid by the schema, and what cannot be kept is refused by name.

Not all that is valid is accepted, as there is more than one way to write it. What is generated has

- properties in the order of the schema, each at most once, and further ones behind them;
- no further properties where `properties` are given and `additionalProperties` is not: a schema that lists what it
  wants means that (OpenAI's strict mode and vLLM say the same). `additionalProperties: true` asks for them;
- one line, with the white space of `json.dumps` or none; numbers as in `json_text.py`;
- arrays and objects at most `Limits.nesting` deep where any JSON may stand, a `$ref` at most `Limits.recursion` deep.

Kept: type, enum, const; minimum, maximum and their exclusive forms, multipleOf with integers; minLength, maxLength,
pattern, format of `FORMATS`; properties, required, additionalProperties, patternProperties, propertyNames,
minProperties, maxProperties, dependencies; items, prefixItems, minItems, maxItems; local $ref, allOf, anyOf; oneOf,
`not` and `if` where it can be proved that what is generated is not valid by the other schemas. Titles, descriptions,
defaults and unknown words ask for nothing.

A schema becomes a list of alternatives, each a `Part` that has all keywords side by side. For the proofs of oneOf, the
others are read with `outer`: then a part may allow more than its schema does, never less.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from .automaton import Automaton, ConstraintError, ConstraintTooLarge, Node
from .exclusion import excluded
from .json_text import JsonText
from .schema_nodes import PartNodes
from .schema_parts import Part, merge, read_keywords, refuse

__all__ = ["schema_language"]

MOST_PARTS = 256  # alternatives of one schema, when all its anyOf are multiplied out


def schema_language(automaton: Automaton, schema: Any) -> Node:
    """The JSON texts that a schema (a dict, a bool, or its JSON as str) allows.

    Raises ConstraintError that names the path and the keyword of what is not supported, or says that nothing is left.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as e:
            raise ConstraintError(f"json schema: expected JSON, got {e}") from None
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise ConstraintError(f"json schema: expected what JSON can hold, got {e}") from None
    if len(text) > automaton.limits.source:
        raise ConstraintTooLarge(
            f"json schema: expected at most {automaton.limits.source} characters as JSON, got {len(text)}"
        )
    with automaton.timed():
        node = _Reader(automaton, schema).node(schema, "#", automaton.limits.recursion)
    if node is automaton.nothing:
        raise ConstraintError("json schema: #: nothing that can be generated satisfies it")
    return node


class _Reader:
    """Reads one schema document. `depth` is how many more `$ref` may be followed."""

    def __init__(self, automaton: Automaton, root: Any) -> None:
        self._a, self._root, self._level = automaton, root, 0
        self._json = JsonText(automaton)
        self._draft4 = isinstance(root, dict) and re.search(r"draft-0[34]", str(root.get("$schema", ""))) is not None
        self._nodes: dict[tuple[int, int], Node] = {}
        self._kept: list[Any] = []  # schemas whose id is a key, so that no other gets it
        self._work = 0

    def node(self, schema: Any, path: str, depth: int) -> Node:
        """The language of a schema that stands at a path."""
        key = id(schema), depth
        if key not in self._nodes:
            self._level += 1
            if self._level > 4 * self._a.limits.depth:
                raise ConstraintTooLarge(f"json schema: {path}: nested too deeply")
            parts = self.parts(schema, path, depth)
            self._nodes[key] = self._a.union([self._part_node(part) for part in parts])
            self._kept.append(schema)
            self._level -= 1
        return self._nodes[key]

    def _part_node(self, part: Part) -> Node:
        return PartNodes(self._a, self._json, lambda schema, path: self.node(schema, path, part.depth)).node(part)

    # ---- alternatives ----------------------------------------------------------------------------------------------

    def parts(self, schema: Any, path: str, depth: int, outer: bool = False) -> list[Part]:
        """The alternatives of a schema; none where nothing is valid, or with `outer` might be."""
        self._work += 1
        if self._work > self._a.limits.states:
            raise ConstraintTooLarge(f"json schema: {path}: too many schemas when all references are followed")
        if isinstance(schema, bool):
            return [Part(path, depth)] if schema else []
        if not isinstance(schema, dict):
            raise refuse(path, "schema", f"expected an object or a boolean, got {json.dumps(schema)[:60]}")
        if outer:
            return self._outer_parts(schema, path, depth)
        if schema is not self._root and isinstance(schema.get("$id"), str) and '"$ref"' in json.dumps(schema):
            raise refuse(path, "$id", "references within a schema that has a name of its own are not supported")
        found = [read_keywords(schema, path, depth, outer)]
        if "$ref" in schema:
            if depth == 0:
                return []  # deep enough: other alternatives are left
            target, at = self._target(schema["$ref"], path)
            found = self._product(found, self.parts(target, at, depth - 1))
        for branch in self._branches(schema, "allOf", path, depth):
            found = self._product(found, branch)
        if "anyOf" in schema:
            found = self._product(found, _flat(self._branches(schema, "anyOf", path, depth)))
        for conditions in self._dependencies(schema, path):
            found = self._product(found, _flat([self.parts(one, at, depth) for one, at in conditions]))
        if "oneOf" in schema:
            found = self._one_of(found, schema, path, depth)
        # What no keyword of this schema, nor of those within, has looked at: all of them are in the parts by now.
        for keyword, name in (("unevaluatedProperties", "additional"), ("unevaluatedItems", "items")):
            if keyword in schema:
                found = [replace(p, **{name: schema[keyword]}) if getattr(p, name) is None else p for p in found]
        return self._without(found, schema, path, depth)

    def _outer_parts(self, schema: dict[str, Any], path: str, depth: int) -> list[Part]:
        """Alternatives that allow what the schema allows in any draft: up to 7 a $ref stands alone, 4 has no const."""
        if "$ref" in schema:
            target, at = self._target(schema["$ref"], path)
            return self.parts(target, at, depth - 1, outer=True) if depth else [Part(path)]
        known = {key: value for key, value in schema.items() if key != "const" or not self._draft4}
        found = [read_keywords(known, path, depth, outer=True)]
        for branch in self._branches(schema, "allOf", path, depth, outer=True):
            found = self._product(found, branch, outer=True)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                found = self._product(
                    found, _flat(self._branches(schema, keyword, path, depth, outer=True)), outer=True
                )
        return found

    def _list(self, schema: dict[str, Any], keyword: str, path: str) -> list[Any]:
        found = schema.get(keyword, [])
        if not isinstance(found, list) or (keyword in schema and not found):
            raise refuse(path, keyword, "expected an array of schemas")
        return found

    def _branches(
        self, schema: dict[str, Any], keyword: str, path: str, depth: int, outer: bool = False
    ) -> list[list[Part]]:
        return [
            self.parts(one, f"{path}/{keyword}/{i}", depth, outer)
            for i, one in enumerate(self._list(schema, keyword, path))
        ]

    def _product(self, left: list[Part], right: list[Part], outer: bool = False) -> list[Part]:
        if len(left) * len(right) > MOST_PARTS:
            raise ConstraintTooLarge(f"json schema: {left[0].path}: more than {MOST_PARTS} alternatives in combination")
        merged = [merge(a, b, outer) for a in left for b in right]
        return [part for part in merged if part.types]

    def _one_of(self, found: list[Part], schema: dict[str, Any], path: str, depth: int) -> list[Part]:
        """Each branch without what another branch allows, too."""
        mine = self._branches(schema, "oneOf", path, depth)
        others = self._branches(schema, "oneOf", path, depth, outer=True)
        result = []
        for i, branch in enumerate(mine):
            wrong = [part for j, other in enumerate(others) if j != i for part in other]
            for part in self._product(found, branch):
                kept = self._excluded(part, self._product([part], wrong, outer=True))
                if kept is None:
                    raise refuse(
                        path, "oneOf", f"it is not clear that branch {i} is valid by no other branch; use anyOf"
                    )
                result.append(kept)
        return [part for part in result if part.types]

    def _without(self, found: list[Part], schema: dict[str, Any], path: str, depth: int) -> list[Part]:
        """`not`, and `if` with what follows from it."""
        if "not" in schema:
            wrong = self.parts(schema["not"], f"{path}/not", depth, outer=True)
            found = self._all_excluded(found, wrong, path, "not")
        if "if" in schema and ("then" in schema or "else" in schema):
            met = self.parts({"allOf": [schema["if"], schema.get("then", True)]}, f"{path}/if", depth)
            wrong = self.parts(schema["if"], f"{path}/if", depth, outer=True)
            otherwise = self._product(found, self.parts(schema.get("else", True), f"{path}/else", depth))
            return self._product(found, met) + self._all_excluded(otherwise, wrong, path, "if")
        return found

    def _all_excluded(self, found: list[Part], wrong: list[Part], path: str, keyword: str) -> list[Part]:
        kept = [self._excluded(part, wrong) for part in found]
        if None in kept:
            raise refuse(path, keyword, "what it excludes cannot be told apart from what is generated")
        return [part for part in kept if part is not None and part.types]

    def _excluded(self, part: Part, wrong: Iterable[Part]) -> Part | None:
        return excluded(part, wrong, lambda schema, of, outer: self.parts(schema, of.path, of.depth, outer))

    def _dependencies(self, schema: dict[str, Any], path: str) -> Iterable[list[tuple[Any, str]]]:
        """If a property is there, so are others: it is not, or they are."""
        for keyword in ("dependencies", "dependentRequired", "dependentSchemas"):
            if not isinstance(schema.get(keyword, {}), dict):
                raise refuse(path, keyword, "expected an object")
            for name, needs in schema.get(keyword, {}).items():
                at = f"{path}/{keyword}/{name}"
                names = [needs] if isinstance(needs, str) else needs
                then = {"required": names} if isinstance(names, list) else {"allOf": [names]}
                present = {"type": "object", "required": [name], **then}
                if "required" in then:
                    present["required"] = [name, *then["required"]]
                others = ["null", "boolean", "number", "string", "array"]
                yield [({"type": others}, at), ({"type": "object", "properties": {name: False}}, at), (present, at)]

    # ---- references ------------------------------------------------------------------------------------------------

    def _target(self, reference: Any, path: str) -> tuple[Any, str]:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise refuse(path, "$ref", f"expected a path within the schema (#/...), got {json.dumps(reference)[:80]}")
        at = self._root
        for step in reference.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(at, list) and step.isdecimal() and int(step) < len(at):
                at = at[int(step)]
            elif isinstance(at, dict) and step in at:
                at = at[step]
            else:
                raise refuse(path, "$ref", f"{reference[:80]} leads nowhere")
            if at is not self._root and isinstance(at, dict) and isinstance(at.get("$id"), str) and "$ref" in str(at):
                raise refuse(
                    path, "$ref", "a schema with an $id of its own, which references are relative to, is not supported"
                )
        return at, reference


def _flat(branches: Iterable[list[Part]]) -> list[Part]:
    return [part for branch in branches for part in branch]
