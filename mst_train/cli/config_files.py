"""What is wrong with a configuration file, by file and line, before Hydra reads it.

Hydra and OmegaConf end with tracebacks, or not at all, where a file is no YAML, has names that are
no text, or includes itself.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

DEEPEST = 20
LARGEST = 10_000
LONGEST_NUMBER = 300
"""Levels, values and digits: more than any configuration has, less than what Python ends at."""

NAMES = [f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge", "timestamp")]
KINDS = [
    *NAMES,
    *(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "null", "bool", "int", "float")),
]


EVERYWHERE = ("experiment/", "bench/")
"""Groups whose files have settings of all groups."""

_PACKAGED = re.compile(r"\s*#[ \t]*@package ")
"""As Hydra reads the first line."""

_MISLEADING = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""010 is 8, and 1:30 is 90."""


def file_problems(
    folders: Sequence[Path], name: str, text_problem: Callable[[str], str | None]
) -> Iterator[str]:
    """Every problem of ``name.yaml``, in the first of these folders that has it, and of the files
    that it includes.

    text_problem: says what is wrong with the interpolations of a text, if anything.
    """
    yield from _problems(folders, name, (), text_problem)


def _problems(
    folders: Sequence[Path],
    name: str,
    includers: tuple[str, ...],
    text_problem: Callable[[str], str | None],
) -> Iterator[str]:
    paths = [folder / f"{name}.yaml" for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return  # Hydra says who includes it
    if name in includers:
        yield f"{path} includes itself, by way of {' and '.join(includers)}: take that out"
        return
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        yield f"{path} is not UTF-8: write it anew"
        return
    except RecursionError:
        yield f"{path} has more than {DEEPEST} levels"
        return
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        yield f"{path}, line {line}, is not YAML: {error.problem or error.context}"
        return
    except yaml.YAMLError as error:
        yield f"{path} is not YAML: {str(error).partition(chr(10))[0]}"
        return
    if name.startswith(EVERYWHERE) and not _PACKAGED.match(text):
        yield f"{path}, line 1, is not '# @package _global_', so it sets nothing: begin with that"
        return
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        yield f"{path} holds no settings: write it as GROUP: {{SETTING: VALUE}}"
        return
    found = [
        f"{path}, line {mark.line + 1}: {problem}"
        for mark, problem in _Reader(text_problem).problems(node, ())
    ]
    yield from found
    if not found:
        for included in _included(node, name):
            yield from _problems(folders, included, (*includers, name), text_problem)


class _Reader:
    """Walks through one file."""

    def __init__(self, text_problem: Callable[[str], str | None]) -> None:
        self._text_problem = text_problem
        self._left = LARGEST

    def problems(
        self, node: yaml.Node, above: tuple[yaml.Node, ...]
    ) -> Iterator[tuple[yaml.Mark, str]]:
        self._left -= 1
        if self._left == 0:
            yield node.start_mark, f"more than {LARGEST} values are here and before"
        elif node in above:
            yield node.start_mark, "an alias stands inside of what it is the name of"
        elif len(above) > DEEPEST:
            yield node.start_mark, f"more than {DEEPEST} levels"
        elif self._left > 0:
            if node.tag not in KINDS:
                yield node.start_mark, f"{node.tag} is no kind of value that settings have"
            if isinstance(node, yaml.MappingNode):
                yield from self._names(node, top=not above)
                children = [value for _, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            else:
                yield from self._scalar(node)
                children = []
            for child in children:
                yield from self.problems(child, (*above, node))

    def _names(self, node: yaml.MappingNode, *, top: bool) -> Iterator[tuple[yaml.Mark, str]]:
        seen = set()
        for key, _ in node.value:
            name = key.value
            if key.tag not in NAMES:
                what = name if isinstance(key, yaml.ScalarNode) and name else "this"
                yield key.start_mark, f"{what} is not a name: put it in quotes"
                continue
            if name in seen:
                yield key.start_mark, f"{name} is there twice: leave one out"
            if "." in name:
                group, _, rest = name.partition(".")
                yield key.start_mark, f"write {name} as {group}: {{{rest}: VALUE}}"
            if top and name == "hydra":
                yield (
                    key.start_mark,
                    "hydra's own settings do nothing here: Hydra composes settings and runs "
                    "nothing",
                )
            seen.add(name)

    def _scalar(self, node: yaml.Node) -> Iterator[tuple[yaml.Mark, str]]:
        if node.tag.endswith((":int", ":float")):
            if _MISLEADING.fullmatch(node.value):
                yield (
                    node.start_mark,
                    f"YAML takes {node.value} for another number: put it in quotes",
                )
            elif len(node.value) > LONGEST_NUMBER:
                yield node.start_mark, f"a number has more than {LONGEST_NUMBER} digits"
        else:
            problem = self._text_problem(node.value)
            if problem:
                yield node.start_mark, problem


def _included(node: yaml.MappingNode, name: str) -> Iterator[str]:
    """The names of files in a defaults list, in the forms that Hydra has for them."""
    group = name.rpartition("/")[0]
    for key, entries in node.value:
        if key.value != "defaults" or not isinstance(entries, yaml.SequenceNode):
            continue
        for entry in entries.value:
            target = entry.value
            if isinstance(entry, yaml.MappingNode) and len(target) == 1:
                ((choice, option),) = target
                if not isinstance(choice.value, str) or not isinstance(option.value, str):
                    continue
                target = f"{choice.value.split()[-1].partition('@')[0]}/{option.value}"
            if isinstance(target, str) and target != "_self_":
                absolute = target.startswith("/") or not group
                yield target.lstrip("/") if absolute else f"{group}/{target}"
