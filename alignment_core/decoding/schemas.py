"""JSON schemas: what can't be enforced is refused, what restricts nothing is left out, and objects are closed."""

import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

MAX_LENGTH = 1 << 17  # characters
MAX_REFERENCES, MAX_DEPTH = 500, 100  # beyond, llguidance may overflow its stack
# Measured on the worst schemas: none compiles for a second, and no mask takes much of a step.
MAX_LITERALS, LONG_LITERAL = 1 << 14, 256  # the time of a mask grows with the literal that the reply is writing
MAX_TRIED = 64  # patterns of a schema
MAX_JOINED_PATTERNS, MAX_PATTERN_PROPERTIES, MAX_MULTIPLES = 8, 64, 100_000
REFUSED = ("minProperties", "multipleOf", "patternProperties")
NOT_ENFORCED = ("description", "title", "$comment", "examples", "default")
# Formats of strings that JSON Schema defines. Others are annotations, which restrict nothing.
FORMATS = {"date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"}
FORMATS |= {"uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer"}
FORMATS |= {"relative-json-pointer", "regex"}
# Keywords that hold schemas: one, a list of them, or some by name.
ONE: tuple[str, ...] = (
    "items",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "additionalItems",
)
ONE += ("unevaluatedItems", "unevaluatedProperties")
MANY = ("prefixItems", "allOf", "anyOf", "oneOf", "items")
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SAME_VALUE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")  # apply beside their siblings
SAYS_MORE = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
NAMES_NO_MEMBERS = {*NOT_ENFORCED, *SAME_VALUE, "deprecated", "readOnly", "writeOnly", "nullable", "type"}
NAMES_NO_MEMBERS |= {"$ref", "$schema", "$id", "$defs", "definitions", "discriminator"}


def prepared(schema: Any) -> Any:
    """The schema in the form that is compiled. Raises ValueError as `refuse_in_schema` does.

    Annotations that llguidance does not know are left out. An object with `properties` gets no other members unless
    the schema says so: models invent names until max_tokens. The object stays open if further schemas apply to it,
    because these may name other members.
    """
    refuse_in_schema(schema)
    schema = _without_annotations(schema)
    seen = set[tuple[int, bool]]()
    try:
        _find_parts(schema, schema, False, seen)
    except RecursionError as error:
        raise ValueError("its references are nested too deeply") from error
    return _closed(schema, {id for id, is_part in seen if is_part})


def _without_annotations(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    schema = _mapped(schema, _without_annotations)
    if schema.get("propertyNames") in ({"type": "string"}, {}, True):
        schema.pop("propertyNames")
    if "format" in schema and schema["format"] not in FORMATS:
        schema.pop("format")
    return schema


def without_descriptions(schema: Any) -> Any:
    """The schema without texts for the model, which would make a grammar long."""
    if not isinstance(schema, dict):
        return schema
    return _mapped({key: value for key, value in schema.items() if key not in NOT_ENFORCED}, without_descriptions)


def without_refused(schema: Any, is_pattern: Callable[[str], bool]) -> Any:
    """The schema without keywords that `refuse_in_schema` refuses, and without invalid patterns.

    is_pattern: Tries a pattern. Only the first MAX_TRIED are tried; further ones are left out.
    """
    num_tried = 0

    def change(schema: Any) -> Any:
        nonlocal num_tried
        if not isinstance(schema, dict):
            return schema
        copy = _mapped({key: value for key, value in schema.items() if key not in REFUSED}, change)
        num_tried += "pattern" in copy
        if "pattern" in copy and (num_tried > MAX_TRIED or not is_pattern(copy["pattern"])):
            copy.pop("pattern")
        return copy

    return change(schema)


def _find_parts(schema: Any, root: Any, is_part: bool, seen: set[tuple[int, bool]]) -> None:
    """Collect the ids of all schemas, each with whether other schemas apply to the same value: then it is a part."""
    if not isinstance(schema, dict) or (id(schema), is_part) in seen:
        return
    seen.add((id(schema), is_part))
    joins = is_part or bool(schema.keys() - NAMES_NO_MEMBERS) or len(schema.get("allOf") or ()) > 1
    if isinstance(schema.get("$ref"), str) and joins:
        _find_parts(resolved(root, schema["$ref"]), root, True, seen)
    for keyword, inner in _subschemas(schema):
        _find_parts(inner, root, joins and keyword in SAME_VALUE, seen)


def _closed(schema: Any, parts: set[int]) -> Any:
    """The schema with `additionalProperties: false` in objects that are no parts. parts: Ids of schemas."""
    if not isinstance(schema, dict):
        return schema
    closed = _mapped(schema, lambda inner: _closed(inner, parts))
    names, required = schema.get("properties"), schema.get("required")
    if not isinstance(names, dict) or id(schema) in parts or schema.keys() & (SAYS_MORE | {"$ref", *SAME_VALUE}):
        return closed
    if set(required if isinstance(required, list) else ()) <= names.keys():
        closed["additionalProperties"] = False
    return closed


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside a schema, each with its keyword."""
    for keyword, value in schema.items():
        if keyword in BY_NAME and isinstance(value, dict):
            yield from ((keyword, inner) for inner in value.values())
        elif keyword in MANY and isinstance(value, list):
            yield from ((keyword, inner) for inner in value)
        elif keyword in ONE:
            yield keyword, value


def _mapped(schema: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of the schema with every schema directly inside it changed."""
    copy = dict(schema)
    for keyword, value in schema.items():
        if keyword in BY_NAME and isinstance(value, dict):
            copy[keyword] = {name: change(inner) for name, inner in value.items()}
        elif keyword in MANY and isinstance(value, list):
            copy[keyword] = [change(inner) for inner in value]
        elif keyword in ONE:
            copy[keyword] = change(value)
    return copy


def refuse_in_schema(schema: Any) -> None:
    """Raises ValueError for a schema that llguidance does not enforce, or can't compile safely within a second.

    minProperties is refused beyond the required properties, because llguidance counts a repeated name twice.
    """
    if (length := len(json.dumps(schema))) > MAX_LENGTH:
        raise ValueError(f"it has {length} characters, more than {MAX_LENGTH}")
    multiples = num_pattern_properties = num_references = 0
    for item in _dicts(schema):
        num_references += "$ref" in item
        min_properties, required = item.get("minProperties"), item.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        if isinstance(min_properties, int) and min_properties > max(1, num_required):
            raise ValueError("minProperties beyond the required ones is not implemented")
        multiple, patterns = item.get("multipleOf"), item.get("patternProperties")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            multiples += int("".join(map(str, Decimal(str(multiple)).as_tuple().digits)))
        num_pattern_properties += len(patterns) if isinstance(patterns, dict) else 0
    try:
        joined = [_joined(schema, schema, key) for key in ("pattern", "multipleOf")]
    except RecursionError as error:
        raise ValueError("its references are nested too deeply") from error
    for size, maximum, unit in (
        (length_of_literals(schema), MAX_LITERALS, "characters in long strings"),
        (num_pattern_properties, MAX_PATTERN_PROPERTIES, "patternProperties"),
        (num_references, MAX_REFERENCES, "references"),
        (multiples, MAX_MULTIPLES, "in its multipleOf together"),
        (joined[0], MAX_JOINED_PATTERNS, "patterns for one string"),
        (joined[1], 1, "multipleOf for one number"),
    ):
        if size > maximum:
            raise ValueError(f"it has {size} {unit}, more than {maximum}")


def _dicts(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value. Raises ValueError if the value is nested too deeply."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it has more than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(item, depth + 1)


def length_of_literals(value: Any) -> int:
    """Characters in long strings, names included. Short strings do not count: an enumeration may have many."""
    if isinstance(value, str):
        return len(value) if len(value) > LONG_LITERAL else 0
    if isinstance(value, dict):
        items = [item for name, item in value.items() if not (name in NOT_ENFORCED and isinstance(item, str))]
        return sum(map(length_of_literals, (*value, *items)))
    return sum(map(length_of_literals, value)) if isinstance(value, list) else 0


def _joined(
    root: Any, schema: Any, key: str, within: tuple[str, ...] = (), memory: dict[str, int] | None = None
) -> int:
    """An upper bound of how many occurrences of a keyword apply to one value at once.

    within: References that are being followed. memory: The results of references.
    """
    memory = {} if memory is None else memory
    if not isinstance(schema, dict):
        return 0
    num = int(key in schema and not isinstance(schema[key], dict))
    target = schema.get("$ref")
    if isinstance(target, str) and target not in within:
        if target not in memory:
            memory[target] = _joined(root, resolved(root, target), key, (*within, target), memory)
        num += memory[target]
    others = {name: item for name, item in schema.items() if name not in ("allOf", "$ref", "$defs", "definitions")}
    both = schema.get("allOf")
    num += sum(_joined(root, item, key, within, memory) for item in both) if isinstance(both, list) else 0
    members: list[Any] = []
    for name, item in others.items():
        if name in ("properties", "patternProperties") and isinstance(item, dict):
            members += item.values()
        elif isinstance(item, list):
            members += item
        else:
            members.append(item)
    return num + max((_joined(root, item, key, within, memory) for item in members), default=0)


def resolved(root: Any, reference: str) -> Any:
    """The part of a schema that a reference points to; None if there is none."""
    value = root
    for name in reference.removeprefix("#").split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list):
            value = value[int(name)] if name.isdecimal() and int(name) < len(value) else None
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value
