"""Command lines of training programs: every field of a settings class is a flag, a variable and a TOML key.

A flag beats the environment, the environment beats the file given by --config, the file beats the default.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import annotated_types
import pydantic_settings
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, TomlConfigSettingsSource

SettingsType = TypeVar("SettingsType", bound=BaseSettings)

_BOUNDS = ((annotated_types.Ge, "ge", "at least"), (annotated_types.Gt, "gt", "above"),
           (annotated_types.Le, "le", "at most"), (annotated_types.Lt, "lt", "below"))  # fmt: skip


class SettingsError(ValueError):
    """The settings cannot be used; one line that names the setting and the remedy."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; --help lists the flags")


def load_settings(
    settings_type: type[SettingsType],
    program: str,
    arguments: Sequence[str],
    descriptions: Mapping[str, str] | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> SettingsType:
    """Return the settings of a command line, the environment and the file of --config.

    Args:
        settings_type: frozen, with ``env_prefix``, ``env_nested_delimiter`` "__" and ``extra`` "forbid". Its
            docstring heads the help text. Fields of nested models are flags with dots: --model.num-blocks.
        program: name of the command.
        arguments: the command line without the program's name.
        descriptions: help of fields (dotted names) that have no description of their own.
        synonyms: further flags, by the name of the field each stands for.

    Raises:
        SettingsError: a setting is unknown, missing or out of range, or the file cannot be read.
        SystemExit: after --help.
    """
    descriptions = {} if descriptions is None else descriptions
    synonyms = {} if synonyms is None else synonyms
    fields = _settings_of(settings_type)
    prefix = str(settings_type.model_config["env_prefix"])
    parser = _build_parser(settings_type, fields, program, prefix, descriptions)
    written = [_normalise(argument, synonyms) for argument in arguments]
    flags = vars(parser.parse_args(written))
    _check_environment(fields, prefix)
    file = flags.pop("config", os.environ.get(f"{prefix}CONFIG"))
    source = settings_type if file is None else _with_file(settings_type, Path(file))
    try:
        return source(**_nest(flags))
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(item, fields) for item in error.errors())) from None
    except pydantic_settings.SettingsError as error:
        raise SettingsError(
            f"a {prefix}... variable is not valid: {error}; lists are written as JSON"
        ) from None


@dataclass(frozen=True)
class _Setting:
    """What one dotted name means: one field, or one for each member of a union that has it.

    Attributes:
        members: (kind, field), kind being the tag of the union's member; "" outside unions.
        is_common: whether all members of the union have it.
    """

    members: tuple[tuple[str, FieldInfo], ...]
    is_common: bool = True

    @property
    def field(self) -> FieldInfo:
        """The first member's field, which says how the flag is written."""
        return self.members[0][1]

    @property
    def kinds(self) -> str:
        """The kinds that have it, for a reader."""
        return ", ".join(kind for kind, _ in self.members)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values it may have, if they can be listed."""
        types_ = [field.annotation for _, field in self.members]
        if any(get_origin(type_) is not Literal for type_ in types_):
            return ()
        return tuple(dict.fromkeys(choice for type_ in types_ for choice in get_args(type_)))

    @property
    def is_tag(self) -> bool:
        """Whether it says which member of a union is meant."""
        return len(self.members) > 1 and all(
            get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
            for _, field in self.members
        )


def _settings_of(model: type[BaseModel], prefix: str = "") -> dict[str, _Setting]:
    """Return the settings by dotted name, nested models opened."""
    settings: dict[str, _Setting] = {}
    for name, field in model.model_fields.items():
        members = list(_nested_models(field.annotation))
        if not members:
            settings[f"{prefix}{name}"] = _Setting((("", field),))
        elif len(members) == 1:
            settings |= _settings_of(members[0], f"{prefix}{name}.")
        else:
            settings |= _settings_of_union(members, f"{prefix}{name}.")
    return settings


def _settings_of_union(members: Sequence[type[BaseModel]], prefix: str) -> dict[str, _Setting]:
    found: dict[str, list[tuple[str, FieldInfo]]] = {}
    for member in members:
        kind = str(member.model_fields["kind"].default)
        for name, setting in _settings_of(member, prefix).items():
            found.setdefault(name, []).append((kind, setting.field))
    return {name: _Setting(tuple(parts), len(parts) == len(members)) for name, parts in found.items()}


def _nested_models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _nested_models(part)


def _build_parser(
    settings_type: type[BaseSettings],
    settings: Mapping[str, _Setting],
    program: str,
    prefix: str,
    descriptions: Mapping[str, str],
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        usage=f"{program} [--config FILE.toml] [--key value ...]",
        description=settings_type.__doc__,
        epilog=f"Each flag is also an environment variable (--a.b-c: {prefix}A__B_C) and a TOML key "
        "(b_c in [a]). Flags beat variables, variables beat the file.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings")
    for name, setting in settings.items():
        text = f"{_meaning(name, setting, descriptions)}{_range_of(setting.field)}{_default_of(setting)}"
        options: dict[str, Any] = {"dest": name, "metavar": "VALUE", "help": text.strip().replace("%", "%%")}
        annotation = setting.field.annotation
        origin = get_origin(annotation)
        if annotation in (bool, bool | None):
            options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
        elif any(get_origin(part) in (tuple, list) for part in (annotation, *get_args(annotation))):
            options |= {"nargs": "*"}
        elif origin is dict:
            options |= {"type": _json_value, "metavar": "JSON"}
        elif len(setting.choices) > 1:
            options |= {"metavar": "|".join(map(str, setting.choices))}
        parser.add_argument(f"--{_flag(name)}", **options)
    return parser


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from None


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _normalise(argument: str, synonyms: Mapping[str, str]) -> str:
    """Write --batch_size as --batch-size, which is the same flag, and synonyms as what they stand for."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{_flag(synonyms.get(name, name))}{equals}{value}"


def _range_of(field: FieldInfo) -> str:
    limits = [
        f"{words} {getattr(constraint, key)}"
        for constraint in field.metadata
        for kind, key, words in _BOUNDS
        if isinstance(constraint, kind)
    ]
    return f"; {', '.join(limits)}" if limits else ""


def _meaning(name: str, setting: _Setting, descriptions: Mapping[str, str]) -> str:
    """Return what a setting means, by kind where its kinds differ."""
    texts = {kind: field.description or descriptions.get(name, "") for kind, field in setting.members}
    if name in descriptions or len(set(texts.values())) == 1:
        text = descriptions.get(name, setting.field.description or "")
        return text if setting.is_common else f"{setting.kinds}: {text}"
    return "; ".join(f"{kind}: {text}" for kind, text in texts.items())


def _default_of(setting: _Setting) -> str:
    if setting.is_tag:
        return ""  # the default of the whole union is no field's
    if setting.field.is_required():
        return " (required)"
    defaults = {kind: _default_text(field) for kind, field in setting.members}
    if len(set(defaults.values())) == 1:
        text = defaults[setting.members[0][0]]
    else:
        text = ", ".join(f"{text} for {kind}" for kind, text in defaults.items() if text)
    return f" (default: {text})" if text else ""


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return "" if default is None or default == () else str(default)


def _check_environment(fields: Mapping[str, _Setting], prefix: str) -> None:
    """Refuse variables with our prefix that no setting has: they are typing errors."""
    known = {"config"}
    for name in fields:
        parts = name.split(".")
        known |= {"__".join(parts[:end]) for end in range(1, len(parts) + 1)}
    for variable in sorted(os.environ):
        name = variable.lower().removeprefix(prefix.lower())
        if variable.upper().startswith(prefix) and name not in known:
            hint = _did_you_mean(name, known, lambda close: prefix + close.upper())
            raise SettingsError(f"{variable} in the environment is no setting{hint}")


def _with_file(settings_type: type[SettingsType], path: Path) -> type[SettingsType]:
    """Return a settings class that also reads a TOML file."""
    try:
        tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"--config: cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # bad TOML or bad UTF-8
        raise SettingsError(f"--config: {path} is not TOML: {error}") from None

    class FromFile(settings_type):  # type: ignore[valid-type,misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    return FromFile


def _nest(flags: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flags.items():
        *groups, last = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return nested


def _explain(item: Any, fields: Mapping[str, _Setting]) -> str:
    """Say in one line what pydantic found wrong with one setting."""
    name = ""
    for part in map(str, item["loc"]):
        longer = f"{name}.{part}" if name else part
        # The tag of a union is part of pydantic's path, but of no name that a user writes.
        is_tag = any(known.startswith(f"{name}.") for known in fields) and not any(
            known == longer or known.startswith(f"{longer}.") for known in fields
        )
        is_key = item["type"] == "extra_forbidden" and part == str(item["loc"][-1])
        name = name if is_tag and not is_key else longer
    if item["type"] == "extra_forbidden" and name in fields:
        group = f"{name.rpartition('.')[0]}.kind"
        return f"{name} does not go with this {group}; it belongs to {fields[name].kinds}"
    if item["type"] == "extra_forbidden":
        groups = {known.rpartition(".")[0] for known in fields} - {""}
        return f"{name} is no setting{_did_you_mean(name, {*fields, *groups}, str)}"
    if item["type"] == "missing":
        return f"--{_flag(name)} is missing: give it as a flag or in the --config file"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    given = item["input"]
    shown = f", got {given!r}" if isinstance(given, str | int | float) and len(str(given)) < 80 else ""
    return f"--{_flag(name)}: {message[:1].lower()}{message[1:]}{shown}"


def _did_you_mean(name: str, known: set[str], spell: Any) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {spell(close[0])}?" if close else "; --help lists them"
