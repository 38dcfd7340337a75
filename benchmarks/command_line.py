"""Flags, environment and TOML file of the benchmarks: one parser for all of their settings classes."""

from __future__ import annotations

import argparse
import difflib
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, TomlConfigSettingsSource

from benchmarks.settings import ENV_PREFIX, BenchSettings

SettingsType = TypeVar("SettingsType", bound=BenchSettings)

PROGRAM = "prime-bench"


class UsageError(ValueError):
    """The settings cannot be used; the message names the setting."""


def add_settings(parser: argparse.ArgumentParser, settings_type: type[BenchSettings]) -> None:
    """Give a parser the flags of a settings class, and those of the result."""
    for name, field in settings_type.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="X",
            default=argparse.SUPPRESS,
            help=f"{field.description}{_default(field)}".replace("%", "%%"),
        )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to a file")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of these settings")


def load_settings(
    settings_type: type[SettingsType],
    flags: Mapping[str, Any],
    config: Path | None,
    known_types: Iterable[type[BenchSettings]],
) -> SettingsType:
    """Return the settings: a flag beats the environment, the environment the file, the file the default.

    Args:
        settings_type: which.
        flags: those that were given.
        config: a TOML file; None takes that of PRIME_BENCH_CONFIG, if there is one.
        known_types: the settings of all benchmarks, which share the variables PRIME_BENCH_....

    Raises:
        UsageError: if a setting is unknown or out of range, also in the environment, or the file cannot be read.
    """
    _check_environment({"config", *(name for known in known_types for name in known.model_fields)})
    if config is None and (named := os.environ.get(f"{ENV_PREFIX}CONFIG")):
        config = Path(named)
    try:
        return (settings_type if config is None else _with_file(settings_type, config))(**flags)
    except ValidationError as error:
        raise UsageError("; ".join(explain(item["loc"], item["msg"]) for item in error.errors())) from None
    except ValueError as error:  # the file is not TOML
        raise UsageError(f"--config: {config}: {error}") from None


def explain(loc: tuple[int | str, ...], message: str) -> str:
    """Say in one line what pydantic found wrong with a setting."""
    message = message.removeprefix("Value error, ")
    return f"--{str(loc[0]).replace('_', '-')}: {message[:1].lower()}{message[1:]}" if loc else message


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() or field.default is None else f" (default: {field.default})"


def _check_environment(names: set[str]) -> None:
    """Refuse variables with our prefix that no setting of any benchmark has: they are typing errors."""
    known = [ENV_PREFIX + name.upper() for name in sorted(names)]
    for variable in sorted(os.environ):
        name = variable.upper()
        if name.startswith(ENV_PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"{PROGRAM} COMMAND --help lists them"
            raise UsageError(f"{variable} in the environment is no setting; {hint}")


def _with_file(settings_type: type[SettingsType], config: Path) -> type[SettingsType]:
    """Return a settings class that also reads a TOML file, after flags and environment."""
    if not config.is_file():
        raise UsageError(f"--config: there is no file {config}")

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
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config)

    return typing.cast("type[SettingsType]", FromFile)
