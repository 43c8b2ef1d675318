"""From a command line to a frozen configuration: Hydra composes, the dataclasses decide.

Hydra reads ``configs/``; the result is checked leaf by leaf against the dataclasses of config.py,
so that one message lists every unknown key, wrong type and impossible value.
"""

import difflib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mst_train.config import Config, leaves, validate
from mst_train.errors import UserError

DEFAULT_EXPERIMENT = "tiny"


def compose(arguments: Sequence[str]) -> Config:
    """The configuration that command-line overrides such as ``train.steps=40`` ask for.

    Without a ``+experiment=NAME`` or ``+bench=NAME`` among them, it is the experiment "tiny".
    Raises UserError with every problem found.
    """
    folder = config_folder()
    overrides = _overrides(folder, arguments)
    tree = _compose_tree(folder, overrides)
    model = tree.get("model")
    name = model.get("from_pretrained") if isinstance(model, dict) else None
    if isinstance(name, str) and name.strip():
        from mst_train.pretrained import with_pretrained  # which imports torch

        given = {override.lstrip("+").partition("=")[0] for override in overrides}
        tree = with_pretrained(tree, given)
    return _checked(leaves(tree), [])


def recompose(settings: dict[str, Any], arguments: Sequence[str]) -> Config:
    """A run's own ``settings`` (groups of them), with those of the arguments in their place.

    Settings of a run that are unknown today are left out. Raises UserError with every problem
    found.
    """
    parser, given, problems = OverridesParser.create(), dict[str, Any](), []
    for override in _overrides(config_folder(), arguments):
        parsed = parser.parse_override(override)
        if override.startswith("++"):
            given[parsed.key_or_group] = parsed.value()
        elif parsed.key_or_group != "experiment":
            problems.append(
                f"cannot use {override}: a run keeps its own settings; change them one by one"
            )
    known = {key: value for key, value in leaves(settings) if _is_known(key)}
    values = known | given
    return _checked(values.items(), problems)


def config_folder() -> Path:
    """The folder of configuration files: the checkout's, or the installed copy."""
    beside = Path(__file__).parent.parent
    installed = Path("share", "mst_train", "configs")
    places = [beside / "configs", beside / installed, Path(sysconfig.get_path("data")) / installed]
    return next((place for place in places if place.is_dir()), places[0])


def choices(group: str) -> list[str]:
    """The names of a configuration group's files."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def describe(config: Config) -> str:
    """The configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _overrides(folder: Path, arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra takes them, with unknown keys let through to our own check."""
    groups = {path.name for path in folder.iterdir() if path.is_dir()}
    parser = OverridesParser.create()
    overrides, problems, chosen = [], [], False
    for argument in arguments:
        argument = _quoted_where_needed(parser, argument)
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            problems.append(f"cannot read {argument!r}: expected key=value ({_first_line(error)})")
            continue
        if argument[0] == "~" or override.is_sweep_override():
            problems.append(f"cannot use {argument!r}: give a setting one value (null for none)")
            continue
        key = override.key_or_group
        if key in ("experiment", "bench"):
            chosen = True
            overrides.append(f"+{key}=" + argument.partition("=")[2])
        elif key in groups and isinstance(override.value(), str):
            overrides.append(argument.lstrip("+"))
        else:
            overrides.append("++" + argument.lstrip("+"))
    if problems:
        raise UserError(problems)
    return overrides if chosen else [f"+experiment={DEFAULT_EXPERIMENT}", *overrides]


def _quoted_where_needed(parser: OverridesParser, argument: str) -> str:
    """``argument`` with its value in quotes where Hydra has no such bare word (~/texts)."""
    key, equals, value = argument.partition("=")
    try:
        parser.parse_override(argument)
    except HydraException:
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        if equals and key and not key.startswith("-"):
            return f"{key}='{quoted}'"
    return argument


def _compose_tree(folder: Path, overrides: list[str]) -> Any:
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = hydra_compose("config", overrides)
        return OmegaConf.to_container(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_group_problem(overrides) or _first_line(error)) from error


def _group_problem(overrides: list[str]) -> str | None:
    for override in overrides:
        group, _, name = override.lstrip("+").partition("=")
        known = choices(group)
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            return f"{group}={name} is not known: {hint}"
    return None


def _set(schema: Any, key: str, value: Any) -> str | None:
    """Put a value into the structured configuration; what is wrong with it, if anything."""
    names = known_keys()
    if not _is_known(key):
        members = [name for name in names if name.startswith(f"{key}.")]
        if members:
            return f"{key} is a group of settings: set one of {', '.join(members)}"
        close = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "see python -m mst_train --help"
        return f"{key} is not a setting: {hint}"
    inside = key not in names
    if not inside and isinstance(value, float) and value.is_integer() and _type_of(key) is int:
        value = int(value)  # 1e3 is a whole number too
    try:
        OmegaConf.update(schema, key, value, force_add=inside)
    except OmegaConfBaseException as error:
        return f"{key}={value}: {_first_line(error)}"
    return None


def known_keys() -> list[str]:
    """Every setting's key."""
    return list(_keys(Config, ""))


def _is_known(key: str) -> bool:
    """Whether this is a setting, or inside one that takes settings of another program."""
    names = known_keys()
    return key in names or any(key.startswith(f"{n}.") for n in names if _is_open(n))


def _is_open(name: str) -> bool:
    return get_origin(_type_of(name)) is dict


def _type_of(key: str) -> Any:
    section: Any = Config
    for name in key.split("."):
        section = next(field.type for field in fields(section) if field.name == name)
    return section


def _keys(section: Any, prefix: str) -> Iterator[str]:
    for field in fields(section):
        if is_dataclass(field.type):
            yield from _keys(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _checked(values: Iterable[tuple[str, Any]], problems: list[str]) -> Config:
    """The configuration with these values; UserError with its ``problems`` and all others."""
    schema = OmegaConf.structured(Config)
    _make_writable(schema)
    for key, value in values:
        problem = _set(schema, key, value)
        if problem:
            problems.append(problem)
    if problems:
        raise UserError(problems)
    try:
        config = OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from error
    assert isinstance(config, Config)
    problems = validate(config)
    if problems:
        raise UserError(problems)
    return config


def _make_writable(node: Any) -> None:
    """Frozen dataclasses make read-only nodes; these are still being filled."""
    OmegaConf.set_readonly(node, False)
    for name in node if OmegaConf.is_dict(node) else ():
        child = node._get_node(name)
        if OmegaConf.is_config(child):
            _make_writable(child)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
