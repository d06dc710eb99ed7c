"""Dataclasses as YAML: every field is a key, checked against its type when a file is read."""

import dataclasses
import types
import typing

from visualrwkv.errors import InputError, one_line


def read(path, wanted):
    """The mapping that a YAML file holds.

    Args:
        path: pathlib.Path.
        wanted: what to pass in place of a file that cannot be read, for the message.
    Raises:
        InputError: no YAML, no mapping, or a key that is there twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _refuse_twice(yaml.compose(text, yaml.SafeLoader), path)
        raw = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); pass {wanted}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values, this file holds {type(raw).__name__}")
    return raw


def _refuse_twice(node, path):
    """A key that stands twice in a mapping: YAML would take the last value and forget the others."""
    keys = [key for key, _ in node.value] if node is not None and node.id == "mapping" else []
    for number, key in enumerate(keys):
        if key.value in (former.value for former in keys[:number]):
            raise InputError(f"{path}: line {key.start_mark.line + 1}: the key {key.value!r} is there twice; keep one")
    if node is not None and node.id != "scalar":
        for child in node.value:
            _refuse_twice(child[1] if node.id == "mapping" else child, path)


def override(raw, text):
    """Sets one `dotted.key=value` in the nested mappings and lists of `raw`; the value is read as YAML.

    Raises:
        InputError: there is no such place.
    """
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"{text!r}: an override is written key=value, for example steps=100 or train.language=3e-4")
    try:
        value = yaml.safe_load(value) if value else None
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{text!r}: the value is not valid YAML") from error
    *parents, last = key.split(".")
    place = raw
    for name in parents:
        if isinstance(place, list):
            place = place[_index(place, name, text)]
        else:
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
        if not isinstance(place, (dict, list)):
            raise InputError(f"{text!r}: {name!r} is a single value and has no keys below it")
    if isinstance(place, list):
        last = _index(place, last, text)
    place[last] = value


def _index(items, name, text):
    if not name.isdigit() or int(name) >= len(items):
        raise InputError(f"{text!r}: {name!r} is no position in a list of {len(items)}, counted from 0")
    return int(name)


def fill(kind, raw, source):
    """A dataclass from a mapping, nested ones too.

    Args:
        kind: the dataclass; a field name may end in `_` where the key is a reserved word.
        source: whose mapping it is, for messages.
    Raises:
        InputError: an unknown or missing key, or a value of another type, by its dotted key.
    """
    return _convert(raw, kind, source, "")


def dump(value):
    """The YAML text of a dataclass, every default filled in; `read` and `fill` give it back equal."""
    import yaml

    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True)


def _key(dataclass_field):
    """The YAML key of a field; `from_` stands for the reserved word `from`."""
    return dataclass_field.name.rstrip("_")


def _plain(value):
    """Dataclasses and tuples as the mappings and lists that YAML knows."""
    if dataclasses.is_dataclass(value):
        return {_key(f): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _convert(value, hint, source, where):
    """`value` as the type of `hint`; `where` is its dotted key, for messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        fitting = [c for c in choices if isinstance(value, typing.get_origin(c) or c)] if len(choices) > 1 else choices
        if not fitting:
            raise _wrong(value, " or ".join(_name(c) for c in choices), source, where)
        return _convert(value, fitting[0], source, where)
    if dataclasses.is_dataclass(hint):
        return _convert_dataclass(value, hint, source, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(value, "a mapping", source, where)
        return {str(key): _convert(item, arguments[1], source, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise _wrong(value, "a list", source, where)
        return [_convert(item, arguments[0], source, f"{where}.{i}") for i, item in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise _wrong(value, f"a list of {len(arguments)} numbers", source, where)
        return tuple(
            _convert(v, a, source, f"{where}.{i}") for i, (v, a) in enumerate(zip(value, arguments, strict=True))
        )
    if hint is float:
        return _number(value, source, where)
    if (
        hint is str
        and isinstance(value, (bool, int, float))
        or not isinstance(value, hint)
        or hint is int
        and isinstance(value, bool)
    ):
        raise _wrong(value, _name(hint), source, where)
    return value


def _convert_dataclass(value, hint, source, where):
    if not isinstance(value, dict):
        raise _wrong(value, "a mapping", source, where)
    fields = {_key(f): f for f in dataclasses.fields(hint)}
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in fields:
            raise InputError(f"{source}: unknown key '{prefix}{key}'; known keys there: {', '.join(fields)}")
    for key, entry in fields.items():
        needed = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if needed and key not in value:
            raise InputError(f"{source}: the key '{prefix}{key}' is missing")
    hints = typing.get_type_hints(hint)
    return hint(**{fields[k].name: _convert(v, hints[fields[k].name], source, prefix + k) for k, v in value.items()})


def _number(value, source, where):
    """A float; YAML reads 1e-3 (without a point) as text, people do not."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise _wrong(value, "a number", source, where)


def _name(hint):
    names = {int: "a whole number", str: "a text", bool: "true or false", dict: "a mapping", float: "a number"}
    return names.get(typing.get_origin(hint) or hint, str(hint))


def _wrong(value, wanted, source, where):
    return InputError(f"{source}: {where or 'the recipe'} is {value!r}, expected {wanted}")
