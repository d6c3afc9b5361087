"""Settings from three places, later ones win: the defaults of schema.py, the YAML files under configs/, the command line.

Hydra composes them; build.py turns the result into the frozen dataclasses and refuses what is wrong in one line.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import yaml

from minitron.config.build import build, from_yaml, require, to_yaml, unknown
from minitron.config.schema import Config
from minitron.config.verbs import VERBS
from minitron.errors import RequestError, refuse

__all__ = ["choices", "compose", "from_yaml", "to_yaml"]
HYDRA_CFG = ("job", "hydra", "all")  # what Hydra's own --cfg is followed by


def compose(verb: str, overrides: list[str], *, complete: bool = True, base: Config | None = None) -> Config:
    """The settings of one run of `verb`: `configs/VERB.yaml`, then `overrides` in Hydra's syntax. `base` stands in the place of the defaults.

    `complete=False` lets settings that the verb needs stay open (`???`). Raises RequestError, in one line, for
    whatever is wrong with the request.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = [checked(override) for override in overrides]
    # a plain dict: OmegaConf would make the frozen dataclasses themselves read-only
    ConfigStore.instance().store("schema", dataclasses.asdict(base or Config()))
    try:
        with initialize_config_dir(str(configs_dir()), version_base="1.3"):
            tree = OmegaConf.to_container(hydra_compose(verb, overrides), resolve=True)
    except OmegaConfBaseException as error:  # its text goes on, over several lines, with OmegaConf's own affairs
        raise RequestError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except (HydraException, yaml.YAMLError) as error:
        raise RequestError(f"cannot compose the settings: {' '.join(str(error.__cause__ or error).split())}") from error
    config = build(Config, tree)
    if complete:
        require(config, verb, VERBS[verb].needs)
    return config


def checked(text: str) -> str:
    """One override, held against the names that exist, in the form that sets a value whether or not it is there already."""
    override = parsed(text)
    key, value = override.key_or_group, override.value()
    if override.is_delete():
        raise RequestError(f"{text}: a setting can't be removed; SETTING=VALUE is needed")
    if override.is_sweep_override():
        value = override.get_value_string()
        raise refuse(key, value, f"one value is needed; quote what belongs together: '{key}=\"{value}\"'")
    if override.package is None and key in groups():
        if value not in list(choices(key)):  # a list: the value itself may be one, which no dict can look up
            raise refuse(key, value, f"one of {', '.join(choices(key))} is needed")
        return text.lstrip("+")
    if override.package is not None or key.split(".")[0] not in {field.name for field in dataclasses.fields(Config)}:
        raise unknown(text.lstrip("+").partition("=")[0], value)
    return f"++{text.lstrip('+')}"


def parsed(text: str) -> Any:
    """Hydra's own reading of one override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if text in HYDRA_CFG:
        raise RequestError(f"{text}: --cfg takes no word after it; minitron VERB [SETTING=VALUE ...] --cfg prints the composed settings")
    if "=" not in text.lstrip("=") and not text.startswith("~"):
        raise RequestError(f"{text}: SETTING=VALUE is needed")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        name, _, value = text.partition("=")
        raise refuse(name, value, f"Hydra can't read this; quote special characters: '{name}=\"{value}\"'") from error


@functools.cache
def configs_dir() -> Path:
    """`configs/`: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def groups() -> list[str]:
    """The folders of configs/, each a group of files to choose from: recipe first, as it holds a full set."""
    folders = [path.name for path in configs_dir().iterdir() if path.is_dir() and not path.name.startswith("_")]
    return sorted(folders, key=lambda name: (name != "recipe", name))


def choices(group: str) -> dict[str, str]:
    """What `group=` may be set to, each with the comment that opens its file. Files that start with _ are parts of others."""
    return {path.stem: opening_comment(path) for path in sorted((configs_dir() / group).glob("[!_]*.yaml"))}


def opening_comment(path: Path) -> str:
    """The comment lines at the head of a YAML file, as one line, without Hydra's directives."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(line for line in lines if not line.startswith("@package"))
