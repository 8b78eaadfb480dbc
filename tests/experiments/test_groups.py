"""Plug-ins become Hydra groups: what a name and a key may be."""

import pytest

from experiments.groups import GROUPS, allow_new_keys, configure, named_config, plain_values
from experiments.settings import CompareSettings, Settings
from fedraclora.plugins import UnknownPlugin, names
from tests.helpers import plug_in, settings


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, package in GROUPS.items() for name in names(package)]
)
def test_every_plug_in_has_a_configuration_that_carries_its_name(group, name):
    assert configure(group, name, {}).name == name


def test_settings_of_a_plug_in_are_typed():
    assert configure("method", "rac_lora", {"rounds_per_link": 3}).rounds_per_link == 3
    with pytest.raises(ValueError, match="rounds_per_link"):
        configure("method", "rac_lora", {"rounds_per_link": "three"})


def test_unknown_settings_and_plug_ins_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'side'"):
        configure("method", "rac_lora", {"sidee": "a"})
    with pytest.raises(UnknownPlugin, match="did you mean 'fed_it'"):
        named_config("method", "fedit")


def test_mappings_take_new_keys_and_nothing_else_does():
    given = ["ranks={fc1: 4}", "ranks.fc1=4", "rank=4", "method_settings={full: {lr: 0.1}}", "-m"]
    assert allow_new_keys(given, CompareSettings) == [
        "++ranks={fc1: 4}",
        "++ranks.fc1=4",
        "rank=4",
        "++method_settings={full: {lr: 0.1}}",
        "-m",
    ]
    assert allow_new_keys(["method_settings={full: 1}"], Settings) == ["method_settings={full: 1}"]


def test_plain_values_go_all_the_way_down():
    values = plain_values(settings(rank=3))
    assert values["rank"] == 3
    assert values["method"]["name"] == "rac_lora"
    assert values["sketch"] == {"law": "orthonormal"}


def test_a_plug_in_may_not_have_a_setting_called_name(monkeypatch):
    class Config:
        name: str = "mine"

    path = plug_in(monkeypatch, "named", Config, lambda config, adapter: None)
    for act in (lambda: named_config("method", path), lambda: configure("method", path, {})):
        with pytest.raises(ValueError, match=r"method 'made_up\.named' has a setting called 'name'.*rename it"):
            act()
