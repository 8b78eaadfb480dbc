"""The help text says what every setting means, and the presets compose."""

import re
from dataclasses import fields, is_dataclass

import pytest
from omegaconf import OmegaConf

from experiments.cli import main
from experiments.groups import CONF
from experiments.settings import CompareSettings
from tests.helpers import compare_settings

FOOTER = (CONF / "shared.yaml").read_text(encoding="utf-8").partition("== What the settings mean ==")[2]


def setting_names():
    """Return every setting by the name under which the command line has it; groups have settings of their own."""
    chosen = compare_settings()
    for item in fields(CompareSettings):
        value = getattr(chosen, item.name)
        nested = is_dataclass(value) and not hasattr(value, "name")
        yield from [f"{item.name}.{own.name}" for own in fields(value)] if nested else [item.name]


@pytest.mark.parametrize("name", list(setting_names()))
def test_every_setting_is_explained(name):
    assert name in re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*", FOOTER)


def test_the_compression_preset_sets_a_method_and_its_compressed_variants_apart_by_sending_alone(capfd):
    assert main(["compare", "experiment=compression", "--cfg", "job"]) == 0
    shown = OmegaConf.create(capfd.readouterr().out)
    assert set(shown.variants) < set(shown.methods)
    for label, changes in shown.variants.items():
        assert changes.keys() <= {"method", "uplink", "memory"}
        assert label.startswith(changes.method)
        assert changes.method in shown.methods
        assert changes.method in shown.method_settings
