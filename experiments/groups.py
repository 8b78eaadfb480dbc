"""The plug-ins as Hydra groups: what the folders hold, and what a command line names from outside them."""

from collections.abc import Iterable, Mapping
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.settings import CompareSettings, Settings
from fedraclora.plugins import find, names, nearest

GROUPS: Mapping[str, str] = {
    "method": "strategies",
    "model": "fedraclora.models",
    "dataset": "fedraclora.datasets",
    "partition": "fedraclora.partitions",
}


def named_config(group: str, name: str) -> type:
    """Return the `Config` dataclass of a plug-in with its `name` as one more field.

    Raises UnknownPlugin for a name that is not there, with the nearest ones.
    """
    module = find(GROUPS[group], name)
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
    store = ConfigStore.instance()
    store.store(name="run_settings", node=Settings)
    store.store(name="compare_settings", node=CompareSettings)
    for group, package in GROUPS.items():
        chosen = [
            value for key, _, value in (item.partition("=") for item in overrides) if key == group and "." in value
        ]
        for name in [*names(package), *chosen]:
            store.store(group=group, name=name, node=named_config(group, name))


def check_overrides(overrides: Iterable[str], settings: type) -> None:
    """Raise ValueError for a key or a plug-in that does not exist, naming the nearest valid ones.

    Hydra would refuse them too, but without saying what would be right.
    """
    chosen: dict[str, str] = {}
    plain = [item.lstrip("+~") for item in overrides if "=" in item and not item.startswith(("hydra", "-"))]
    for key, _, value in (item.partition("=") for item in plain):
        if key in GROUPS:
            chosen[key] = value
            for name in value.split(","):
                find(GROUPS[key], name)
    for key in (item.partition("=")[0] for item in plain):
        _check_key(key, settings, chosen)


def _check_key(key: str, settings: type, chosen: Mapping[str, str]) -> None:
    group, _, rest = key.partition(".")
    top = [item.name for item in fields(settings)] + ["experiment"]
    if group not in top:
        raise ValueError(f"unknown setting {group!r}; {nearest(group, top)}")
    if group in GROUPS and rest and "," not in chosen.get(group, "") and group in chosen:
        known = [item.name for item in fields(named_config(group, chosen[group])) if item.name != "name"]
        if rest.partition(".")[0] not in known:
            raise ValueError(f"{group} {chosen[group]!r} has no setting {rest!r}; {nearest(rest, known)}")


def plain_values(settings: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return settings as nested plain values, ready for YAML."""
    return {
        item.name: plain_values(value) if is_dataclass(value := getattr(settings, item.name)) else value
        for item in fields(settings)
    }
