"""What each setting means, from where it is defined: for --help and docs/settings.md."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from mst_train.cli.settings import shown
from mst_train.config import AUTO

WIDTH = 100
KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", dict: "mapping"}


@dataclass(frozen=True)
class Entry:
    """One setting.

    group: the key of its group, empty at the top. values: which it takes.
    """

    group: str
    name: str
    default: str
    values: str
    meaning: str

    @property
    def key(self) -> str:
        """As it is typed."""
        return f"{self.group}.{self.name}".lstrip(".")


def entries(section: Any, group: str = "") -> Iterator[Entry]:
    """Every setting of a dataclass of settings and of the groups in it, in their order."""
    meanings = _meanings(section)
    for setting in fields(section):
        if not is_dataclass(setting.type):
            meaning = meanings[setting.name]
            yield Entry(group, setting.name, _default(setting), _values(setting), meaning)
    for setting in fields(section):
        if is_dataclass(setting.type):
            yield from entries(setting.type, f"{group}.{setting.name}".lstrip("."))


def titles(section: Any, group: str = "") -> dict[str, str]:
    """What each group of settings is about, by its key."""
    found = {group: inspect.cleandoc(section.__doc__ or "")}
    for setting in fields(section):
        if is_dataclass(setting.type):
            found |= titles(setting.type, f"{group}.{setting.name}".lstrip("."))
    return found


def as_text(section: Any, group: str = "") -> str:
    """The settings of a class of configurations, or of one of its groups and those in it, to be
    read in a terminal."""
    lines, about = list[str](), titles(section)
    last: str | None = None
    for entry in entries(section):
        if group and not f"{entry.group}.".startswith(f"{group}."):
            continue
        if entry.group != last:
            lines += [
                "",
                *textwrap.wrap(f"{entry.group}: {about[entry.group]}".lstrip(": "), WIDTH),
            ]
            last = entry.group
        lines.append(f"  {entry.key}={entry.default}   ({entry.values})")
        lines += textwrap.wrap(
            entry.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines).strip("\n")


def as_markdown(section: Any, groups: list[str] | None = None) -> str:
    """The same as tables, one for each group; ``groups``: these alone."""
    lines, about = list[str](), titles(section)
    last: str | None = None
    for entry in entries(section):
        if groups is not None and entry.group not in groups:
            continue
        if entry.group != last:
            name = f"`{entry.group}`" if entry.group else "At the top"
            lines += ["", f"## {name}", "", about[entry.group].partition("\n")[0], ""]
            lines += ["| setting | default | values | meaning |", "|---|---|---|---|"]
            last = entry.group
        cells = (f"`{entry.key}`", f"`{entry.default}`", entry.values, entry.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines[1:]) + "\n"


def _meanings(section: Any) -> dict[str, str]:
    """The text below each field of a class, on one line."""
    source = textwrap.dedent(inspect.getsource(section))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for statement, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                text = " ".join(str(below.value.value).split())
            found[statement.target.id] = text
    inherited = [_meanings(base) for base in section.__bases__ if is_dataclass(base)]
    return {name: text for texts in inherited for name, text in texts.items()} | found


def _default(setting: "Field[Any]") -> str:
    value = setting.default
    if value is MISSING:
        assert setting.default_factory is not MISSING
        value = setting.default_factory()
    if isinstance(value, (list, dict)):
        return "[]" if value == [] else "{}" if value == {} else f"[{','.join(map(str, value))}]"
    return shown(value)


def _values(setting: "Field[Any]") -> str:
    """What a setting takes, in words."""
    kinds = get_args(setting.type) if isinstance(setting.type, UnionType) else (setting.type,)
    choices = setting.metadata.get("choices")
    words = ["null" if kind is NoneType else _kind(kind) for kind in kinds]
    if setting.default == AUTO and int in kinds:
        words[kinds.index(str)] = AUTO
    if choices:
        words = [", ".join(map(str, choices))]
        if get_origin(setting.type) is list:
            words = [f"list of {words[0]}"]
    return " or ".join(words)


def _kind(kind: Any) -> str:
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        if is_dataclass(item):
            return f"list of {{{', '.join(setting.name for setting in fields(item))}}}"
        return f"list of {KINDS[item]}s"
    return KINDS[get_origin(kind) or kind]
