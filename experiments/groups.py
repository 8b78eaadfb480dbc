"""The plug-ins as Hydra groups: what the folders hold, and what a command line names from outside them."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_origin

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.settings import BudgetSettings, CompareSettings, Settings
from fedraclora.plugins import find, names, nearest

CONF = Path(__file__).resolve().parent / "conf"
GROUPS: Mapping[str, str] = {
    "method": "strategies",
    "model": "fedraclora.models",
    "dataset": "fedraclora.datasets",
    "partition": "fedraclora.partitions",
    "runtime": "experiments.runtimes",
    "uplink": "fedraclora.compressors",
    "downlink": "fedraclora.compressors",
}


def named_config(group: str, name: str) -> type:
    """Return the `Config` dataclass of a plug-in with its `name` as one more field.

    Raises UnknownPlugin for a name that is not there, with the nearest ones.
    """
    module = find(GROUPS[group], name)
    if any(item.name == "name" for item in fields(module.Config)):
        raise ValueError(f"{group} {name!r} has a setting called 'name', which stands for the plug-in's own; rename it")
    return make_dataclass("Config", [("name", str, field(default=name))], bases=(module.Config,))


def configure(group: str, name: str, overrides: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return a plug-in's config object with some fields set. Raises ValueError for an unknown field or a wrong type."""
    known = [item.name for item in fields(named_config(group, name))]
    for key in overrides:
        if key not in known:
            raise ValueError(f"{group} {name!r} has no setting {key!r}; {nearest(key, known)}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(named_config(group, name)), dict(overrides)))
    except OmegaConfBaseException as error:
        raise ValueError(f"settings of {group} {name!r}: {error}") from error


def register(overrides: Iterable[str]) -> None:
    """Make every plug-in known to Hydra, and those that the overrides name by dotted path."""
    _register_own()
    for group, _, name in (item.partition("=") for item in overrides):
        if group in GROUPS and "." in name:
            ConfigStore.instance().store(group=group, name=name, node=named_config(group, name))


@functools.cache
def _register_own() -> None:
    store = ConfigStore.instance()
    store.store(name="run_settings", node=Settings)
    store.store(name="compare_settings", node=CompareSettings)
    store.store(name="budget_settings", node=BudgetSettings)
    for group, package in GROUPS.items():
        for name in names(package):
            store.store(group=group, name=name, node=named_config(group, name))


def check_overrides(overrides: Iterable[str], settings: type, defaults: Mapping[str, str]) -> None:
    """Raise ValueError for a key, a plug-in or a preset that does not exist, naming the nearest valid ones.

    Hydra would refuse them too, but without saying what would be right. `defaults` are the plug-ins chosen by nobody.
    """
    plain = [item.lstrip("+~") for item in overrides if "=" in item and not item.startswith(("hydra", "-"))]
    pairs = [(key, value) for key, _, value in (item.partition("=") for item in plain)]
    chosen = {key: value for key, value in pairs if key in GROUPS}
    presets = [name for key, value in pairs if key == "experiment" for name in value.split(",")]
    for key, value in chosen.items():
        for name in value.split(","):
            find(GROUPS[key], name)
    valid = preset_names()
    for preset in presets:
        if preset not in valid:
            raise ValueError(f"no preset {preset!r}; {nearest(preset, valid)}")
    for key, _ in pairs:
        # A preset may choose other plug-ins, whose keys only Hydra will know.
        _check_key(key, settings, chosen if presets else {**defaults, **chosen})


def preset_names() -> list[str]:
    """Return the names of the presets, those in folders with their folder: `demo`, `paper/mnist`."""
    folder = CONF / "experiment"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def names_preset(overrides: Iterable[str]) -> bool:
    """Return whether the overrides choose a preset."""
    return any(item.lstrip("+").startswith("experiment=") for item in overrides)


def allow_new_keys(overrides: Iterable[str], settings: type) -> list[str]:
    """Return the overrides so that Hydra lets mappings (`ranks={fc1: 4}`) have keys that it cannot know."""
    mappings = {item.name for item in fields(settings) if get_origin(item.type) is dict}
    return [f"++{item}" if re.split(r"[.=]", item)[0] in mappings else item for item in overrides]


def _check_key(key: str, settings: type, chosen: Mapping[str, str]) -> None:
    group, _, rest = key.partition(".")
    top = [item.name for item in fields(settings)] + ["experiment"]
    if group not in top:
        raise ValueError(f"unknown setting {group!r}; {nearest(group, top)}")
    if rest and group in chosen and "," not in chosen[group]:
        known = [item.name for item in fields(named_config(group, chosen[group])) if item.name != "name"]
        if rest.partition(".")[0] not in known:
            raise ValueError(f"{group} {chosen[group]!r} has no setting {rest!r}; {nearest(rest, known)}")


def default_plugins(command: str) -> dict[str, str]:
    """Return the plug-in of each group that a command uses where none is named."""
    listed = OmegaConf.to_container(OmegaConf.load(CONF / f"{command}.yaml"))
    assert isinstance(listed, dict)
    named = [item for item in listed["defaults"] if isinstance(item, dict)]
    return {group: name for item in named for group, name in item.items() if group in GROUPS}


def to_overrides(settings: Settings) -> list[str]:
    """Return the overrides with which `compose` makes these settings again: what differs from the defaults.

    Raises ValueError for a text that holds `${`, which Hydra would take for a reference.
    """
    defaults, overrides = Settings(), []
    for item in fields(Settings):
        value = getattr(settings, item.name)
        if item.name in GROUPS:
            overrides += [
                f"{item.name}={value.name}",
                *_changes(value, named_config(item.name, value.name)(), item.name),
            ]
        elif is_dataclass(value):
            overrides += _changes(value, getattr(defaults, item.name), item.name)
        elif value != getattr(defaults, item.name):
            overrides.append(f"{item.name}={_as_override(value)}")
    return overrides


def _changes(config: Any, default: Any, prefix: str) -> list[str]:  # noqa: ANN401
    names = [item.name for item in fields(default) if getattr(config, item.name) != getattr(default, item.name)]
    return [f"{prefix}.{name}={_as_override(getattr(config, name))}" for name in names]


def _as_override(value: object) -> str:
    """Return a value as Hydra's grammar of overrides writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_as_override, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_as_override(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _quoted(text: str) -> str:
    if "${" in text:
        raise ValueError(f"{text!r} holds '${{', which Hydra takes for a reference; name it otherwise")
    # Hydra's grammar: a backslash counts only before a quote, or before backslashes that end in one.
    escaped = re.sub(r"(\\*)($|')", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def compose(overrides: Sequence[str]) -> Settings:
    """Return the settings of a run that these overrides describe, as the command line would.

    Raises ValueError for overrides that cannot be used.
    """
    register(overrides)
    check_overrides(overrides, Settings, default_plugins("run"))
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose("run", overrides=allow_new_keys(overrides, Settings))
        settings = OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"the settings {list(overrides)} cannot be used: {error}") from error
    assert isinstance(settings, Settings)
    return settings


def plain_values(settings: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return settings as nested plain values, ready for YAML."""
    return {
        item.name: plain_values(value) if is_dataclass(value := getattr(settings, item.name)) else value
        for item in fields(settings)
    }
