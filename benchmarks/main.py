"""`prime-bench`: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, TomlConfigSettingsSource

from benchmarks.report import sampler_table, to_json, write_json
from benchmarks.sampler import SamplerSettings, run_comparison

PROGRAM = "prime-bench"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark: its result on stdout, progress on stderr.

    Args:
        argv: the command line without the program's name; None takes ``sys.argv``.

    Returns:
        0; 2 if the settings cannot be used; 1 if the result cannot be written.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = vars(_parser().parse_args(arguments))
    flags.pop("benchmark")
    as_json, output, config = flags.pop("json"), flags.pop("output"), flags.pop("config")
    try:
        _check_environment()
        settings = _settings(config)(**flags)
        if output is not None and not output.parent.is_dir():
            raise ValueError(f"--output: there is no folder {output.parent}")
    except ValidationError as error:
        return _fail("; ".join(_explain(item["loc"], item["msg"]) for item in error.errors()), 2)
    except (OSError, ValueError) as error:
        return _fail(str(error), 2)
    document = run_comparison(settings, _log) | {"command": shlex.join([PROGRAM, *arguments])}
    sys.stdout.write(to_json(document) if as_json else sampler_table(document))
    sys.stdout.flush()
    if output is not None:
        try:
            write_json(document, output)
        except OSError as error:
            return _fail(f"--output: cannot write {output}: {error.strerror}", 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, allow_abbrev=False)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    sampler = benchmarks.add_parser(
        "sampler",
        help="this project's sampler against the published one",
        description="Compare samplers on the same random weights, in one run. Each flag is also an "
        "environment variable (--target-length: PRIME_BENCH_TARGET_LENGTH) and a key of the TOML file.",
        allow_abbrev=False,
    )
    for name, field in SamplerSettings.model_fields.items():
        shown = "" if field.is_required() or field.default is None else f" (default: {field.default})"
        sampler.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="X",
            default=argparse.SUPPRESS,
            help=f"{field.description}{shown}",
        )
    sampler.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sampler.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to a file")
    sampler.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of these settings")
    return parser


def _check_environment() -> None:
    """Refuse variables with our prefix that no setting has: they are typing errors.

    Raises:
        ValueError: if there is one.
    """
    prefix = str(SamplerSettings.model_config["env_prefix"])
    known = [prefix + name.upper() for name in SamplerSettings.model_fields]
    for variable in sorted(os.environ):
        name = variable.upper()
        if name.startswith(prefix) and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"{PROGRAM} sampler --help lists them"
            raise ValueError(f"{variable} in the environment is no setting; {hint}")


def _settings(config: Path | None) -> type[SamplerSettings]:
    """Return the settings class; with a TOML file it is read after flags and environment.

    Raises:
        ValueError: if there is no such file.
    """
    if config is None:
        return SamplerSettings
    if not config.is_file():
        raise ValueError(f"--config: there is no file {config}")

    class FromFile(SamplerSettings):
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

    return FromFile


def _explain(loc: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    return f"--{str(loc[0]).replace('_', '-')}: {message[:1].lower()}{message[1:]}" if loc else message


def _fail(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
