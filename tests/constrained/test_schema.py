"""JSON schemas: what is accepted is valid by the `jsonschema` library, what cannot be kept is refused by name."""

import json
import re
from decimal import Decimal
from random import Random

import jsonschema
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from minillm.constrained import Constraint, ConstraintError, Limits, compile_constraint
from minillm.constrained.schema_nodes import FORMATS

from .vocabularies import random_walk, small


def compiled(schema, **limits) -> Constraint:
    return compile_constraint("json", schema, small(), Limits(**limits))


def accepts(constraint: Constraint, text: str) -> bool:
    return constraint.accepts(constraint.walk(constraint.start, text.encode()))


def check(schema, accepted, refused) -> None:
    """Values are written by json.dumps, strings that are no JSON value as they are, in a list of their own."""
    constraint = compiled(schema)
    for value in accepted:
        for text in (
            json.dumps(value),
            json.dumps(value, ensure_ascii=False),
            json.dumps(value, separators=(",", ":")),
        ):
            assert accepts(constraint, text), text
    for value in refused:
        assert not accepts(constraint, json.dumps(value)), value


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "é\n": {"type": "string"}}, "required": ["a"]}
CASES = [
    (OBJECT, [{"a": 1}, {"a": 1, "é\n": "x"}], [{}, {"é\n": "x"}, {"a": "1"}, {"a": 1, "b": 2}, {"a": 1, "é\n": 1}]),
    ({**OBJECT, "additionalProperties": {"type": "null"}}, [{"a": 1, "b": None}], [{"a": 1, "b": 1}, {"b": None}]),
    ({"required": ["x"], "type": "object"}, [{"x": [1]}, {"x": 1, "y": 2}], [{}, {"y": 1}]),
    ({"type": ["string", "null"]}, ["a", None], [1, [], {}]),
    ({"type": "number"}, [0, -1.5, 1e100, 1e-7, -0.0], ["1", True]),
    ({"type": "integer"}, [0, -12, 10**16], [1.5, True, 10**17]),
    ({"enum": ["a", 1, None, [1, {"b": 2}]]}, ["a", 1, None, [1, {"b": 2}]], ["b", 2, [1], True]),
    ({"enum": ["a", 1, "abc"], "type": "string", "maxLength": 2}, ["a"], [1, "abc"]),
    ({"const": {"a": [True]}}, [{"a": [True]}], [{"a": [False]}, {}]),
    (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        [[True], [True, False]],
        [[], [1], [True] * 3],
    ),
    (
        {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False},
        [[], [1], [1, 2]],
        [[2], [1, 2, 3]],
    ),
    (
        {"type": "array", "items": [{"const": 1}], "additionalItems": {"const": 2}, "minItems": 2},
        [[1, 2], [1, 2, 2]],
        [[1], [1, 1]],
    ),
    ({"type": "array", "maxItems": 0}, [[]], [[1]]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "日é😀", '\n"'], ["a", "abcd", ""]),
    ({"type": "string", "pattern": "b+"}, ["abc", "b"], ["ac", ""]),
    ({"type": "string", "pattern": "^(a|é)$|^x"}, ["a", "é", "xyz"], ["b", "aa"]),
    ({"type": "string", "pattern": '^"\\\\$'}, ['"\\'], ['"', "\\"]),
    ({"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd", "aB"]),
    ({"type": "string", "pattern": "b", "maxLength": 2}, ["ab", "b"], ["aab", "aa"]),
    ({"minimum": 3, "exclusiveMaximum": 12, "type": "integer"}, [3, 7, 11], [2, 12, -3, 111]),
    ({"minimum": -3, "maximum": 2, "exclusiveMinimum": True, "type": "integer"}, [-2, 0, 2], [-3, 3]),
    ({"minimum": 0.5, "maximum": 1.25, "type": "number"}, [0.5, 1, 1.25, 0.75], [0.49, 1.26, 2, -1]),
    ({"multipleOf": 7, "type": "integer", "minimum": 1}, [7, 14, 700], [0, 8, -7]),
    ({"anyOf": [{"type": "null"}, {"minimum": 5, "type": "integer"}]}, [None, 5], [4]),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ["a", 1], [None]),
    ({"oneOf": [{"type": "integer", "maximum": 3}, {"type": "number", "minimum": 3.5}]}, [3, 4.5], [3.25]),
    ({"allOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"}, [3, 5], [2, 6]),
    ({"not": {"type": "string"}, "type": ["string", "null"]}, [None], ["a"]),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "not": {"required": ["a"]}}, [{"b": 1}], [{"a": 1}]),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 1}}}, [1], [2]),
    (
        {"patternProperties": {"^a": {"const": 1}}, "type": "object", "additionalProperties": False},
        [{"ab": 1}],
        [{"ab": 2}, {"b": 1}],
    ),
    ({"propertyNames": {"maxLength": 2}, "type": "object"}, [{"ab": 1}, {}], [{"abc": 1}]),
    (
        {"type": "object", "minProperties": 1, "maxProperties": 2},
        [{"a": 1}, {"a": 1, "b": 2}],
        [{}, {"a": 1, "b": 2, "c": 3}],
    ),
    ({**OBJECT, "dependentRequired": {"a": ["é\n"]}}, [{"a": 1, "é\n": ""}], [{"a": 1}]),
    ({**OBJECT, "unevaluatedProperties": False}, [{"a": 1}], [{"a": 1, "b": 1}]),
    ({"title": "t", "description": "d", "default": 1, "examples": [2], "x-order": 3, "type": "null"}, [None], [1]),
    (
        {"not": {"type": "integer"}, "if": {"type": "string"}, "then": {"maxLength": 1}, "else": False},
        ["a"],
        ["ab", 1, None],
    ),
    ({"if": {"type": "string"}, "then": {"maxLength": 1}, "else": {"type": "null"}}, ["a", None], ["ab", 1]),
]


@pytest.mark.parametrize(("schema", "accepted", "refused"), CASES, ids=lambda value: str(value)[:50])
def test_cases(schema, accepted, refused):
    check(schema, accepted, refused)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"contains": {}}}}, "#/properties/a: contains: is not supported"),
        ({"items": {"uniqueItems": True}}, "#/items: uniqueItems"),
        ({"$ref": "http://x/y"}, r"#: \$ref: expected a path within"),
        ({"$ref": "#/$defs/nowhere"}, "leads nowhere"),
        ({"$dynamicRef": "#a"}, r"\$dynamicRef"),
        ({"type": "strnig"}, "#: type: expected some of null, boolean"),
        ({"type": "string", "pattern": "(?=a)"}, "#: pattern: regex: look-ahead"),
        ({"type": "string", "pattern": 5}, "pattern: expected a string"),
        ({"type": "string", "format": "iri"}, "format: expected one of date"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf: expected an integer"),
        ({"type": "string", "minLength": -1}, "minLength: expected an integer of 0 or more"),
        ({"type": "integer", "minimum": "3"}, "minimum: expected a number"),
        ({"required": True}, "required: expected an array"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf: it is not clear that branch 0"),
        ({"not": {"minLength": 3}}, "not: what it excludes"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "nothing that can be generated"),
        ({"$ref": "#"}, "nothing that can be generated"),
        ({"anyOf": []}, "anyOf: expected an array of schemas"),
        ({"properties": {"a": 5}}, "#/properties/a: schema: expected an object or a boolean"),
        ({"divisibleBy": 2}, "divisibleBy"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_kept_is_refused_by_name(schema, message):
    with pytest.raises(ConstraintError, match=f"json schema: .*{message}"):
        compiled(schema)


def test_references_are_followed_to_a_depth():
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    constraint = compiled(tree, recursion=3)
    assert accepts(constraint, '{"next": {"next": {"next": {}}}}')
    assert not accepts(constraint, '{"next": {"next": {"next": {"next": {}}}}}')


def test_any_json_is_nested_to_a_depth():
    constraint = compiled({}, nesting=2)
    assert accepts(constraint, '[{"a": 1}]')
    assert not accepts(constraint, "[[[]]]")


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"anyOf": [{"const": i} for i in range(20)]} for _ in range(4)]},
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        json.loads('{"items":' * 500 + "{}" + "}" * 500),
        {"type": "string", "pattern": "(a{0,1000}){0,1000}"},
    ],
    ids=["product", "references", "nesting", "pattern"],
)
def test_a_hostile_schema_is_refused(schema):
    with pytest.raises(ConstraintError):
        compiled(schema)


# ---- JSON itself -----------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**16), 10**16)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x == 0 or 1e-99 < abs(x) < 1e99),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('aé"\\\n😀', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(value=json_values)
@example(value=0.00011218977262905898)  # 20 digits behind the point
def test_any_json_is_accepted_by_the_empty_schema(value):
    check({}, [value], [])


ANY = compiled({})


@settings(max_examples=300)
@given(value=json_values, random=st.randoms(use_true_random=False))
def test_what_is_accepted_can_be_read(value, random):
    """Texts with one character changed, left out or doubled: most are no JSON, and whatever is accepted is."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    at = random.randrange(len(text))
    for new in ("", text[at] * 2, random.choice('{}[]",:\\u0eE+-.1d \n\x00ntrue')):
        changed = text[:at] + new + text[at + 1 :]
        if accepts(ANY, changed):
            read = json.loads(changed)
            json.dumps(read, allow_nan=False, ensure_ascii=False).encode()  # no infinity, no lone surrogate


@pytest.mark.parametrize(
    "text",
    [
        r'"\ud800"',
        r'"\ude00\ud83d"',
        '"\ud800"',
        "01",
        "1.",
        ".5",
        "+1",
        "1e999",
        "NaN",
        "[1,]",
        '{"a":1,}',
        "'a'",
        '{"a" : 1}',
        "",
        " 1",
    ],
)
def test_what_is_no_json_is_not_accepted(text):
    constraint = compiled({})
    state = constraint.walk(constraint.start, text.encode("utf-8", "surrogatepass"))
    assert not constraint.accepts(state)


bounds = st.decimals(-(10**5), 10**5, places=3).map(lambda x: x.normalize()) | st.integers(-300, 300).map(Decimal)


@settings(max_examples=300)
@given(low=bounds | st.none(), high=bounds | st.none(), strict=st.tuples(st.booleans(), st.booleans()), data=st.data())
def test_bounds_are_exact(low, high, strict, data):
    """Numbers near a bound, integers and fractions."""
    schema = {"exclusiveMinimum" if strict[0] else "minimum": low, "exclusiveMaximum" if strict[1] else "maximum": high}
    schema = {key: float(value) for key, value in schema.items() if value is not None}
    near = [
        bound + step * sign
        for bound in (low, high, Decimal(0))
        if bound is not None
        for sign in (-1, 0, 1)
        for step in (Decimal("0.001"), Decimal("0.1"), Decimal(1), Decimal(100))
    ]
    valid = jsonschema.Draft202012Validator(schema)
    for kind in ("number", "integer"):
        try:
            constraint = compiled({**schema, "type": kind})
        except ConstraintError:
            constraint = None
        for number in data.draw(st.lists(st.sampled_from(near), max_size=6)):
            whole = number == int(number)
            if kind == "integer" and not whole:
                continue
            text = str(int(number)) if whole else f"{number:f}"
            expected = valid.is_valid(json.loads(text))
            assert (constraint is not None and accepts(constraint, text)) == expected, (schema, text)


PATTERNS = [
    "a",
    "^a",
    "b$",
    "^ab?$",
    "a|^b",
    "^[^a]*$",
    r"\d+",
    r"^\w{2}$",
    r"\s",
    "^.$",
    r"^\D",
    "é",
    r"[\"\\/]",
    "^$",
    "(a|b)c?$",
]
texts = st.text('ab1 é"\\/\n\t_日😀', max_size=4)


@settings(max_examples=300)
@given(pattern=st.sampled_from(PATTERNS), text=texts)
def test_a_pattern_is_searched_for(pattern, text):
    """Python's Unicode classes hold more than those that all dialects share; a newline at the end is none to us."""
    assume(not text.endswith("\n"))
    found = bool(re.search(pattern, text))
    narrow = bool(re.search(pattern, text, re.ASCII)) and found
    constraint = compiled({"type": "string", "pattern": pattern})
    for spelled in (json.dumps(text), json.dumps(text, ensure_ascii=False)):
        accepted = accepts(constraint, spelled)
        assert accepted <= found
        assert accepted or not narrow


@settings(max_examples=100)
@given(
    pattern=st.sampled_from(PATTERNS), names=st.lists(texts, min_size=1, max_size=2, unique=True), n=st.integers(0, 1)
)
def test_names_of_pattern_properties(pattern, names, n):
    """The complement of a pattern must not hold what any dialect would match."""
    schema = {"type": "object", "patternProperties": {pattern: {"const": 0}}, "additionalProperties": {"const": 1}}
    value = dict.fromkeys(names, n)
    if accepts(compiled(schema), json.dumps(value)):
        assert jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    """What is generated passes the library's own check, where it has one without further packages."""
    constraint = compiled({"type": "string", "format": name})
    for seed in range(20):
        text = random_walk(constraint, Random(seed), soft=10)
        if text is not None:
            jsonschema.Draft202012Validator.FORMAT_CHECKER.check(json.loads(text), name)
    samples = {
        "date": "2024-02-29",
        "time": "12:00:00Z",
        "date-time": "2024-01-31T23:59:59.5+01:00",
        "duration": "P1Y2M3D",
        "uuid": "123e4567-e89b-12d3-a456-426614174000",
        "ipv4": "255.0.10.1",
        "ipv6": "1:2:3:4:5:6:7:8",
        "hostname": "a-b.example",
        "email": "a.b@example.org",
        "uri": "https://example.org/a?b=c#d",
    }
    assert accepts(constraint, json.dumps(samples[name]))
    assert not accepts(constraint, '"2023-02-29"') or name == "hostname"


# ---- any schema ------------------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c"]
scalars = st.sampled_from([None, True, False, 0, 1, 1.0, -2, 2.5, "", "a", "ab", "é", [], [1], {}, {"a": 1}])
leaves = st.one_of(
    st.sampled_from(
        [True, {}, {"type": "null"}, {"type": "string"}, {"type": ["integer", "null"]}, {"type": "boolean"}]
    ),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "minLength": st.integers(0, 2),
            "maxLength": st.integers(1, 3),
            "pattern": st.sampled_from(PATTERNS),
            "format": st.sampled_from(["date", "uuid"]),
        },
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={
            "minimum": st.integers(-5, 5),
            "maximum": st.sampled_from([0, 3, 7.5]),
            "exclusiveMinimum": st.sampled_from([-1, 0.5]),
            "multipleOf": st.integers(1, 4),
        },
    ),
    st.lists(scalars, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    scalars.map(lambda value: {"const": value}),
    st.just({"$ref": "#/$defs/d"}),
    st.fixed_dictionaries(
        {},
        optional={"minLength": st.just(1), "minimum": st.just(1), "required": st.just(["a"]), "maxItems": st.just(1)},
    ),
)


def _schemas(inner: st.SearchStrategy) -> st.SearchStrategy:
    many = st.lists(inner, min_size=1, max_size=3)
    names = st.lists(st.sampled_from(NAMES), unique=True, max_size=2)
    objects = st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
            "required": names,
            "additionalProperties": inner | st.booleans(),
            "patternProperties": st.fixed_dictionaries({"^a": inner}),
            "minProperties": st.integers(0, 2),
            "maxProperties": st.integers(1, 3),
            "propertyNames": st.sampled_from([{"maxLength": 1}, {"pattern": "[ab]"}]),
            "dependentRequired": st.fixed_dictionaries({"a": names}),
            "unevaluatedProperties": st.just(False),
            "dependentSchemas": st.fixed_dictionaries({"b": inner}),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={"items": inner, "prefixItems": many, "minItems": st.integers(0, 2), "maxItems": st.integers(0, 3)},
    )
    combined = st.fixed_dictionaries(
        {},
        optional={
            "anyOf": many,
            "oneOf": many,
            "allOf": many,
            "not": inner,
            "if": inner,
            "then": inner,
            "else": inner,
            "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=2),
        },
    )
    return objects | arrays | combined


schemas = st.recursive(leaves, _schemas, max_leaves=8)


@settings(max_examples=500)
@given(schema=schemas, shared=schemas, seed=st.integers(0, 2**32))
def test_what_is_generated_is_valid(schema, shared, seed):
    """Walks through masks, of any schema that is not refused."""
    document = {"allOf": [schema], "$defs": {"d": shared}}
    try:
        constraint = compiled(document, recursion=2, nesting=2)
    except ConstraintError:
        return
    validator = jsonschema.Draft202012Validator(document, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for i in range(4):
        text = random_walk(constraint, Random(seed + i), soft=15, hard=400)
        if text is not None:
            try:
                assert validator.is_valid(json.loads(text)), text
            except RecursionError:  # a schema that refers to itself without end, which the library follows
                return


@settings(max_examples=300)
@given(schema=schemas, value=json_values | scalars)
def test_what_is_not_valid_is_not_accepted(schema, value):
    document = {"allOf": [schema], "$defs": {"d": {"type": "integer"}}}
    try:
        constraint = compiled(document, recursion=2, nesting=3)
    except ConstraintError:
        return
    if accepts(constraint, json.dumps(value)):
        assert jsonschema.Draft202012Validator(document).is_valid(value)
