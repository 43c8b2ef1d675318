"""Settings by their keys: which there are, and what values of their types are.

``mst_train.config`` has the types and the rules; this puts plain values, as a command line or a
YAML file has them, into its dataclasses.
"""

import difflib
import logging
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, get_args, get_origin

from mst_train.config import ALL, Config

Schema = TypeVar("Schema", bound=Config)

log = logging.getLogger(__name__)

LONGEST_TEXT = 4095
LONGEST_NAME = 255
"""Bytes in a path and between its slashes, in every file system that Linux has."""

_TRUTHS = {"true": True, "yes": True, "on": True, "1": True}
_TRUTHS |= {"false": False, "no": False, "off": False, "0": False}


RENAMED: dict[str, tuple[str, dict[Any, Any] | None]] = {
    "memory.keep_attention": ("memory.keep.attention", {True: ALL, False: 0}),
    "evaluation.passkey_every": ("evaluation.every", None),
    "evaluation.passkey_lengths": ("evaluation.lengths", None),
    "evaluation.passkey_depths": ("evaluation.depths", None),
}
"""Settings that have another key now, and what their values mean there; None: the same."""


class Settings(Generic[Schema]):
    """The settings that a configuration has, by their keys."""

    def __init__(self, schema: type[Schema]) -> None:
        self.schema = schema
        self._types = dict(_typed(schema, ""))

    def __iter__(self) -> Iterator[str]:
        """Every setting's key."""
        return iter(self._types)

    def __contains__(self, key: str) -> bool:
        """Whether this is or was a setting, or inside one that takes another program's."""
        return (
            key in self._types
            or key in RENAMED
            or any(
                key.startswith(f"{name}.")
                for name, kind in self._types.items()
                if get_origin(kind) is dict
            )
        )

    def is_group(self, key: str) -> bool:
        """Whether settings have keys that begin with this one."""
        return any(name.startswith(f"{key}.") for name in self._types)

    def is_text(self, key: str) -> bool:
        """Whether the setting is a text, or one or none."""
        return self._types.get(key) in (str, str | None)

    def is_list(self, key: str) -> bool:
        """Whether the setting is several values."""
        return get_origin(self._types.get(RENAMED.get(key, (key,))[0])) is list

    def unknown(self, key: str) -> str:
        """What to say of a key that is no setting."""
        members = [name for name in self._types if name.startswith(f"{key}.")]
        if members:
            return f"{key} is a group of settings: set one of {', '.join(members)}"
        hint = _instead(key, self._types, "python -m mst_train --help")
        return f"{shown(key)} is not a setting: {hint}"

    def flat(self, tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Every setting of a tree of groups by its whole key, and what is no setting by its own."""
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and value and key not in self._types:
                yield from self.flat(value, f"{key}.")
            else:
                yield key, value

    def build(self, values: Iterable[tuple[str, Any]], problems: list[str]) -> Schema:
        """The configuration with these values of these keys, and defaults for the others.

        What is wrong with a key or with its value's type is added to ``problems``, one line each;
        the setting keeps its default then. Rules beyond types are ``config.validate``'s.
        """
        fitted: dict[str, Any] = {}
        for key, value in values:
            found = list[str]()
            if key in RENAMED:
                key, value = _renamed(key, value, found)
            if key in self._types:
                fit = _fitted(self._types[key], key, value, found)
                if not found:
                    fitted[key] = fit
            else:
                found.append(self.unknown(key))
            problems += found
        return _made(self.schema, nested(fitted.items()))  # type: ignore[no-any-return]


def _renamed(key: str, value: Any, problems: list[str]) -> tuple[str, Any]:
    """The present key and value of a setting; what is wrong with the value goes to ``problems``."""
    new, meaning = RENAMED[key]
    was = value if meaning is None else meaning.get(_fitted(bool, key, value, problems))
    if not problems:
        _warn_once(f"{key} is {new} now: taking {new}={_typed_value(was)}")
    return new, was


def _typed_value(value: Any) -> str:
    """As it is typed on a command line."""
    return shown(str(value).replace(" ", "") if isinstance(value, list) else value)


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def shown(value: object, most: int = 80) -> str:
    """A value as messages have it: on one line, of ``most`` characters, null for None."""
    text = (
        str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    )
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def nested(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The tree of groups that has these values at these keys."""
    tree: dict[str, Any] = {}
    for key, value in values:
        *groups, name = key.split(".")
        group = tree
        for part in groups:
            if not isinstance(group.get(part), dict):
                group[part] = {}
            group = group[part]
        group[name] = value
    return tree


def _made(section: Any, tree: Mapping[str, Any]) -> Any:
    kinds = {field.name: field.type for field in fields(section)}
    return section(
        **{
            name: _made(kinds[name], value) if is_dataclass(kinds[name]) else value
            for name, value in tree.items()
        }
    )


def _typed(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        if is_dataclass(field.type):
            yield from _typed(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.type


def _fitted(kind: Any, key: str, value: Any, problems: list[str]) -> Any:
    """``value`` as the type has it; what is wrong with it goes to ``problems``."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return None
    if value is None:
        problems.append(f"{key}=null: it has to have a value")
        return None
    if get_origin(kind) is list:
        if isinstance(value, (list, tuple)):
            (item,) = get_args(kind)
            return [_fitted(item, f"{key}[{i}]", v, problems) for i, v in enumerate(value)]
        example = f"{key}=[{shown(value)}]" if isinstance(value, str) else "such as [a,b]"
        problems.append(f"{key}={shown(value)} is not a list: put it in brackets, {example}")
    elif is_dataclass(kind):
        return _part(kind, key, value, problems)
    elif get_origin(kind) is dict:
        if isinstance(value, dict):
            problems.extend(_not_plain(value, key))
            return value
        problems.append(f"{key}={shown(value)} is not a mapping, such as {{a: 1}}")
    else:
        reasons = []
        for choice in kinds:
            if choice is not NoneType:
                try:
                    return _SCALARS[choice](value)
                except ValueError as error:
                    reasons.append(str(error))
        problems.append(f"{key}={shown(value)} {reasons[0]}")
    return None


def _part(section: Any, key: str, value: Any, problems: list[str]) -> Any:
    """An item of a list that has settings of its own."""
    if not isinstance(value, dict):
        problems.append(f"{key}={shown(value)} is not a mapping, such as {{source: a}}")
        return None
    kinds = {field.name: field.type for field in fields(section)}
    for name in value.keys() - kinds.keys():
        hint = _instead(str(name), kinds, ", ".join(kinds))
        problems.append(f"{key}.{shown(name)} is not a setting: {hint}")
    given = {name: item for name, item in value.items() if name in kinds}
    fitted = {n: _fitted(kinds[n], f"{key}.{n}", item, problems) for n, item in given.items()}
    return section(**fitted)


def _not_plain(value: Any, key: str) -> Iterator[str]:
    """What JSON has no form for, in settings of another program."""
    if isinstance(value, dict):
        for name, item in value.items():
            if isinstance(name, str):
                yield from _not_plain(item, f"{key}.{shown(name)}")
            else:
                yield f"{key}.{shown(name)}: a name has to be text: put it in quotes"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_plain(item, f"{key}[{index}]")
    elif isinstance(value, str):
        try:
            _text(value)
        except ValueError as error:
            yield f"{key}={shown(value)} {error}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key}={value} is not a finite number"
    elif not isinstance(value, (bool, int, float, NoneType)):
        yield f"{key}={shown(value)} is not a number, a text, true, false or null"


def _whole(value: Any) -> int:
    whole = value
    if isinstance(value, str):
        try:
            whole = int(value)
        except ValueError:
            whole = None
    elif isinstance(value, float) and value.is_integer():
        whole = int(value)  # 1e3 is a whole number too
    if not isinstance(whole, int) or isinstance(whole, bool):
        raise ValueError("is not a whole number")
    if not -(2**63) <= whole < 2**63:
        raise ValueError("is too large: whole numbers are below 2^63 here")
    return whole


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("is not a finite number")
    return number


def _truth(value: Any) -> bool:
    truth = _TRUTHS.get(str(value).lower())
    if truth is None:
        raise ValueError("is neither true nor false")
    return truth


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError("is not a text: put it in quotes")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError("has control characters, or bytes that are not UTF-8: leave them out")
    if len(value.encode()) > LONGEST_TEXT:
        raise ValueError(f"is longer than {LONGEST_TEXT} bytes")
    if any(len(part.encode()) > LONGEST_NAME for part in value.split("/")):
        raise ValueError(f"is longer than the {LONGEST_NAME} bytes that a file's name can have")
    return value


_SCALARS: dict[Any, Callable[[Any], Any]] = {int: _whole, float: _number, bool: _truth, str: _text}


def _instead(name: str, names: Iterable[str], otherwise: str) -> str:
    """A hint at what was meant by ``name``: a setting of the same group, else of any."""
    group, _, last = name[:200].rpartition(".")
    keys = list(names)
    near = [key for key in keys if key.rpartition(".")[0] == group]
    tried = ((keys, 1), (near, 0.6), (keys, 0.8))
    close = next(filter(None, (_closest(last, among, cutoff) for among, cutoff in tried)), None)
    close = close or next(iter(difflib.get_close_matches(name[:200], keys, 1, 0.8)), None)
    return f"did you mean {close}?" if close else f"see {otherwise}"


def _closest(name: str, keys: Sequence[str], cutoff: float) -> str | None:
    """The key whose last part is ``name`` to this extent, else the only one whose words begin with
    its letters (lr), else, if any likeness counts, one with such a word (length)."""
    lasts = {key.rpartition(".")[2]: key for key in reversed(keys)}
    if close := difflib.get_close_matches(name, lasts, 1, cutoff):
        return lasts[close[0]]
    short = [last for last in lasts if "".join(w[:1] for w in last.split("_")).endswith(name)]
    if len(name) > 1 and len(short) == 1:
        return lasts[short[0]]
    words = {word: last for last in lasts for word in last.split("_")} if cutoff < 1 else {}
    close = difflib.get_close_matches(name, words, 1, 0.8)
    return lasts[words[close[0]]] if close else None
