"""Where the settings of `prime-serve` come from: flags, the environment, a file.

A flag beats the environment, the environment beats the file, the file beats the default.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, TomlConfigSettingsSource

from server.fault_seam import VARIABLE as FAULTS_VARIABLE
from server.http.keys import KEY_VARIABLES
from server.settings import Settings, SettingsError

# Variables of the other programs, which check them on their own.
OTHER_PROGRAMS = ("PRIME_TRAIN_", "PRIME_EVAL_", "PRIME_SAMPLE_", "PRIME_CLASSIFIER_", "PRIME_BENCH_")


def load_settings(argv: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line, the environment and the file named by --config or PRIME_CONFIG.

    Raises:
        SettingsError: if a setting is unknown or out of range, also in the environment, or the file cannot
            be read.
        SystemExit: on --help and on flags that do not exist.
    """
    flags = vars(_parser().parse_args(argv))
    _check_environment()
    file = flags.pop("config", os.environ.get("PRIME_CONFIG"))
    try:
        return (Settings if file is None else _with_file(Path(file)))(**flags)
    except ValidationError as error:
        raise SettingsError(
            "; ".join(_explain(item["loc"], item["msg"]) for item in error.errors())
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prime-serve",
        description="Serve a trained MDM-Prime model over HTTP. Each flag is also an environment variable "
        "(--max-n: PRIME_MAX_N) and a key of the TOML file (max_n).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings")
    for name, field in Settings.model_fields.items():
        shown = "" if field.default is None or field.default_factory else f" (default: {field.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="X",
            action="append" if name == "model" else "store",
            help=f"{field.description}{shown}",
        )
    return parser


def _check_environment() -> None:
    """Refuse variables with our prefix that no setting has: they are typing errors.

    Kubernetes gives pods variables of every Service in their namespace; those of one named `prime` have our prefix.
    """
    if os.environ.get("PRIME_PORT", "").startswith("tcp://"):
        raise SettingsError(
            "PRIME_PORT in the environment is the address of the Kubernetes Service `prime`, not a port: set "
            "enableServiceLinks: false in the pod, or give the Service another name"
        )
    known = [f"PRIME_{name.upper()}" for name in [*Settings.model_fields, "config"]]
    known += [*KEY_VARIABLES, FAULTS_VARIABLE]
    for variable in sorted(os.environ):
        name = variable.upper()
        if not name.startswith("PRIME_") or name.startswith(OTHER_PROGRAMS) or name in known:
            continue
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else "--help lists the settings"
        raise SettingsError(f"{variable} in the environment is no setting; {hint}")


def _with_file(path: Path) -> type[Settings]:
    """Return the settings class that also reads a TOML file, after its keys were checked."""
    try:
        keys = tomllib.loads(path.read_text("utf-8")).keys()
    except OSError as error:
        raise SettingsError(f"--config: cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # bad TOML or bad UTF-8
        raise SettingsError(f"--config: {path} is not TOML: {error}") from None
    for key in keys - Settings.model_fields.keys():
        close = difflib.get_close_matches(key, Settings.model_fields, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(Settings.model_fields)}"
        raise SettingsError(f"--config: {path} has the unknown key {key!r}; {hint}")

    class FromFile(Settings):
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


def _explain(loc: tuple[int | str, ...], message: str) -> str:
    name = str(loc[0]) if loc else "settings"
    message = message.removeprefix("Value error, ")  # pydantic's mark of a validator of ours
    return f"--{name.replace('_', '-')} (PRIME_{name.upper()}): {message[:1].lower()}{message[1:]}"
