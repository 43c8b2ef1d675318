"""From a command line to a frozen configuration: Hydra composes, the dataclasses decide.

Hydra reads ``configs/``; the result is checked leaf by leaf against the dataclasses of
``mst_train.config``, so that one message lists every unknown key, wrong type and impossible value.
"""

import difflib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mst_train.cli.config_files import DEEPEST, file_problems
from mst_train.cli.config_folders import choices, config_folders, groups
from mst_train.cli.run_name import run_name
from mst_train.cli.settings import Schema, Settings, nested, shown
from mst_train.cli.settings_file import another_run, settings_file, trained_length
from mst_train.config import AUTO, Config, validate
from mst_train.errors import UserError
from mst_train.files import expanded

log = logging.getLogger(__name__)

DEFAULT_EXPERIMENT = "tiny"

NAMING = (
    "experiment",
    "bench",
    "model",
    "model.from_pretrained",
    "data",
    "data.source",
    "data.mixture",
    "run.init_from",
    "run.resume",
)
"""What says what is trained: with one of these it is not the default experiment."""

COMMANDS = ("bench", "plan", "prepare", "report")
"""The groups of settings that commands have beside those of a run, each the one of its name."""


class _Argument(NamedTuple):
    """One argument of a command, and how Hydra takes it."""

    key: str
    value: Any
    file: bool
    """Whether it names a file of a group rather than the value of a setting."""
    hydra: str

    @classmethod
    def choice(cls, group: str, name: str) -> "_Argument":
        added = "+" if group in ("experiment", "bench") else ""
        return cls(group, name, True, f"{added}{group}={name}")


def compose(arguments: Sequence[str]) -> Config:
    """The configuration of a run that overrides such as ``train.steps=40`` ask for."""
    return compose_as(Config, arguments)


def compose_as(
    schema: type[Schema],
    arguments: Sequence[str],
    rules: Callable[[Schema], Iterable[str]] = lambda config: (),
) -> Schema:
    """The configuration of a command, which may have a group of settings beside those of a run.

    Args:
        schema: Config or a class of it with that group. Groups of other commands are left out, with
            a warning where the arguments set them.
        arguments: where none of them names an experiment, a model, data or a checkpoint, it is the
            experiment "tiny". An experiment that is a path is a run's folder, or a file such as its
            config.yaml.
        rules: what is wrong with the group.

    Raises UserError with every problem found: in keys and types, or where these are right, in what
    the values say together.
    """
    path, arguments = settings_file(arguments)
    if path is not None:
        return recompose(another_run(path, arguments, _misread), arguments, schema, rules)
    folders = config_folders()
    settings = Settings(schema)
    given, problems = _read(folders, settings, _heeded(arguments, settings))
    typed = {key: value for a in given for key, value in settings.flat({a.key: a.value})}
    if not any(typed.get(key) not in (None, AUTO, "never") for key in NAMING):
        given.insert(0, _Argument.choice("experiment", DEFAULT_EXPERIMENT))
    files = ["config", *(f"{argument.key}/{argument.value}" for argument in given if argument.file)]
    broken = [line for file in files for line in file_problems(folders, file, _misread)]
    if broken:
        raise UserError([*problems, *broken])
    try:
        tree, chosen = _compose_tree(folders, [argument.hydra for argument in given])
    except UserError as error:
        raise UserError([*problems, *error.problems]) from error
    tree = {
        name: part for name, part in tree.items() if name not in COMMANDS or settings.is_group(name)
    }
    problems += [
        f"{key} has to be given: {key}=VALUE"
        for key, value in settings.flat(tree)
        if value == MISSING
    ]
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", run_name(tree, chosen, typed))
    given_values, _ = _resolved(tree, settings, problems)
    problems += _length_problems(tree, typed)
    name = given_values.get("model.from_pretrained")
    if name is not None and not problems:
        settings.build([("model.from_pretrained", name)], problems)
    if isinstance(name, str) and name.strip() and not problems:
        from mst_train.cli.pretrained import with_pretrained  # which imports torch

        tree = with_pretrained(tree, name, {argument.key for argument in given})
    return _checked(tree, settings, problems, rules)


def recompose(
    before: Mapping[str, Any],
    arguments: Sequence[str],
    schema: type[Schema] = Config,  # type: ignore[assignment]
    rules: Callable[[Schema], Iterable[str]] = lambda config: (),
) -> Schema:
    """A run's settings ``before`` (groups of them), with those of the arguments in their place.

    Settings of a run that are unknown today are left out. Raises UserError with every problem
    found.
    """
    settings = Settings(schema)
    given, problems = _read(config_folders(), settings, _heeded(arguments, settings))
    problems += [
        f"cannot use {argument.hydra}: a run keeps its own settings; change them one by one"
        for argument in given
        if argument.file and argument.key != "experiment"
    ]
    known = [(key, value) for key, value in settings.flat(before) if key in settings]
    changed = [(argument.key, argument.value) for argument in given if not argument.file]
    tree = nested([*known, *changed])
    problems += _length_problems(tree, {key for key, _ in changed})
    return _checked(tree, settings, problems, rules)


def _length_problems(tree: Mapping[str, Any], typed: Collection[str]) -> Iterator[str]:
    """What would leave a run's length as it is, although its steps were typed."""
    train = tree.get("train")
    if isinstance(train, dict) and train.get("tokens") is not None and "train.steps" in typed:
        yield (
            f"train.steps={shown(train.get('steps'))} and train.tokens={shown(train['tokens'])} "
            f"both say how long the run is: leave one out, or set train.tokens=null"
        )


def check_arguments(arguments: Sequence[str]) -> None:
    """UserError with what cannot be read among the arguments, unknown settings, and values of wrong
    types."""
    settings = Settings(Config)
    given, problems = _read(config_folders(), settings, arguments)
    values = [(argument.key, argument.value) for argument in given if not argument.file]
    plain = [(key, value) for key, value in values if "${" not in str(value)]
    settings.build(settings.flat(nested(plain)), problems)
    if problems:
        raise UserError(problems)


def warn_of_unused(arguments: Sequence[str], used: tuple[str, ...]) -> None:
    """Say which of the arguments do nothing for a command that reads these settings alone.

    used: how the keys of settings begin that it reads, and of groups.
    """
    settings = Settings(Config)
    given, _ = _read(config_folders(), settings, arguments)
    for argument in given:
        for key, _ in settings.flat({argument.key: argument.value}):
            if not key.startswith((*used, "experiment")):
                log.warning("%s does nothing in this command", argument.hydra.lstrip("+"))


def describe(config: Config) -> str:
    """The configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _heeded(arguments: Sequence[str], settings: Settings[Schema]) -> list[str]:
    """The arguments without those of other commands' groups, which are warned of."""
    heeded = []
    for argument in arguments:
        group, dot, _ = argument.partition("=")[0].lstrip("+").partition(".")
        chosen = group == "bench" and not dot  # a file, whose other settings count
        if group in COMMANDS and not chosen and not settings.is_group(group):
            log.warning(
                "%s does nothing in this command: it is python -m mst_train.%s's",
                shown(argument),
                group,
            )
        else:
            heeded.append(argument)
    return heeded


def _read(
    folders: list[Path], settings: Settings[Schema], arguments: Sequence[str]
) -> tuple[list[_Argument], list[str]]:
    """The arguments that can be used, and what is wrong with the others."""
    known = groups(folders)
    parser = OverridesParser.create()
    given, problems = [], []
    for argument in arguments:
        try:
            given.append(_read_one(parser, known, settings, argument))
        except UserError as error:
            problems += error.problems
    return given, problems


def _read_one(
    parser: OverridesParser, groups: Collection[str], settings: Settings[Schema], argument: str
) -> _Argument:
    text, override = _parsed(parser, argument)
    if text[0] == "~" or override.is_sweep_override():
        key, _, typed = argument.partition("=")
        listed = f", and several in brackets: {key}=[{typed}]" if settings.is_list(key) else ""
        raise UserError(
            f"cannot use '{shown(argument)}': give a setting one value (null for none){listed}"
        )
    key, value = override.key_or_group, override.value()
    typed = text.partition("=")[2].strip()
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise UserError(
            f"cannot use '{shown(argument)}': Hydra composes settings here and runs nothing"
        )
    if override.package is not None or not key:
        raise UserError(f"cannot use '{shown(argument)}': expected key=value")
    if key in groups and not (isinstance(value, dict) and settings.is_group(key) and value):
        known = choices(key)
        if isinstance(value, str) and value in known:
            return _Argument.choice(key, value)
        close = difflib.get_close_matches(typed[:200], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"{key}={shown(typed)} is not known: {hint}")
    if key not in settings and not (isinstance(value, dict) and settings.is_group(key) and value):
        raise UserError(settings.unknown(key))
    if settings.is_text(key) and isinstance(value, (bool, int, float)):
        value = typed  # 007 and 1e3 are names too
        text = f"{key}='{typed}'"
    problem = _misread(value)
    if problem:
        raise UserError(f"{key}={shown(typed)}: {problem}")
    return _Argument(key, value, False, "++" + text.lstrip("+"))


def _parsed(parser: OverridesParser, argument: str) -> tuple[str, Override]:
    """An argument as Hydra reads it: its value in quotes where Hydra has no such bare word
    (~/texts)."""
    if _levels(argument) > DEEPEST:
        raise UserError(f"cannot read '{shown(argument)}': more than {DEEPEST} levels of brackets")
    key, equals, value = argument.partition("=")
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    texts = [argument]
    if equals and key and not key.startswith("-"):
        texts.append(f"{key}='{quoted}'")
    for text in texts:
        try:
            return text, parser.parse_override(text)
        except HydraException as error:
            problem = _first_line(error)
        except ValueError as error:  # of a number with thousands of digits
            problem = _first_line(error)
            break
    reason = f" ({problem})" if texts[1:] else ": --help lists the settings"
    raise UserError(f"cannot read '{shown(argument)}': expected key=value{reason}")


def _levels(text: str) -> int:
    """How deep brackets are in brackets."""
    level = deepest = 0
    for character in text:
        level += (character in "([{") - (character in ")]}")
        deepest = max(deepest, level)
    return deepest


def _compose_tree(folders: list[Path], overrides: list[str]) -> tuple[Any, dict[str, str]]:
    """The settings, and the file of each group that they come from."""
    try:
        own, *others = (str(folder) for folder in folders)
        searched = [f"hydra.searchpath=[{','.join(map(_quoted, others))}]"] if others else []
        with initialize_config_dir(own, version_base="1.3"):
            config = hydra_compose("config", [*overrides, *searched], return_hydra_config=True)
        chosen = OmegaConf.select(config, "hydra.runtime.choices")
        own_keys = [str(key) for key in config if key != "hydra"]
        return OmegaConf.to_container(OmegaConf.masked_copy(config, own_keys)), dict(chosen)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        # ValueError is Hydra's for a list of defaults that it cannot read.
        raise UserError(f"{', '.join(overrides)}: {_first_line(error)}") from error


def _quoted(folder: str) -> str:
    escaped = folder.replace("\\", "\\\\").replace("'", "\\'")
    return f"'file://{escaped}'"


def _misread(value: object) -> str | None:
    """What is wrong with a value's interpolations, or with what it is at all, if anything."""
    try:
        OmegaConf.create([value])
    except OmegaConfBaseException as error:
        return _first_line(error)
    return None


def _resolved(
    tree: Any, settings: Settings[Schema], problems: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree's settings, and defaults that are made of others, with what interpolations stand for.

    What cannot be resolved is left out, and told in ``problems`` where it is the tree's.
    """
    given = dict(settings.flat(tree))
    for key in list(given):
        problem = _misread(given[key])
        if problem:
            problems.append(f"{key}={shown(given.pop(key))}: {problem}")
    defaults = settings.flat(asdict(settings.schema()))
    derived = {key: value for key, value in defaults if key not in given}
    config = OmegaConf.create(
        nested((key, value) for key, value in (derived | given).items() if key in settings)
    )
    derived = {key: value for key, value in derived.items() if "${" in str(value)}
    for values, found in ((given, problems), (derived, list[str]())):
        for key, value in list(values.items()):
            if "${" in str(value) and key in settings:
                try:
                    node = OmegaConf.select(config, key)
                    plain = OmegaConf.is_config(node)
                    values[key] = OmegaConf.to_container(node, resolve=True) if plain else node
                except OmegaConfBaseException as error:
                    del values[key]
                    found.append(f"{key}={shown(value)}: {_first_line(error)}")
    return given, derived


def _checked(
    tree: Any,
    settings: Settings[Schema],
    problems: list[str],
    rules: Callable[[Schema], Iterable[str]] = lambda config: (),
) -> Schema:
    """The configuration with a tree's settings; UserError with its ``problems`` and all others."""
    given, derived = _resolved(tree, settings, problems)
    config = settings.build(given.items(), problems)
    if not problems:  # or what they are made of is wrong
        config = settings.build((given | derived).items(), problems)
    problems = problems or [*validate(config), *_stretched_from(config), *rules(config)]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return config


def _stretched_from(config: Config) -> Iterator[str]:
    """The length that positions are stretched from, where it is needed and a run has it."""
    scaling, origin = config.model.rope_scaling, config.run.init_from
    if scaling.type in ("yarn", "llama3") and scaling.original_length is None and origin:
        length = trained_length(expanded(origin))
        if length is not None:
            key = "model.rope_scaling.original_length"
            yield f"run.init_from={origin} was trained on {key}={length}"


def _first_line(error: Exception) -> str:
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = f"{first} {others[0]}" if first.endswith(":") and others else first
    return shown(line or type(error).__name__, 300)
