"""Plug-ins become Hydra groups: what a name and a key may be."""

import shlex

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments.groups import (
    CONF,
    GROUPS,
    allow_new_keys,
    check_overrides,
    compose,
    configure,
    default_plugins,
    named_config,
    names_preset,
    plain_values,
    preset_names,
    to_overrides,
)
from experiments.settings import (
    CompareSettings,
    MemorySettings,
    PrivacySettings,
    RobustSettings,
    ServerSettings,
    Settings,
)
from fedraclora.plan import FEEDBACKS
from fedraclora.plugins import UnknownPlugin, names
from fedraclora.privacy import LEVELS
from fedraclora.server_rule import RULES
from strategies.merging import AGGREGATES
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
    assert values["sketch"] == {"law": "orthonormal", "shared": True}


def test_a_plug_in_may_not_have_a_setting_called_name(monkeypatch):
    class Config:
        name: str = "mine"

    path = plug_in(monkeypatch, "named", Config, lambda config, adapter: None)
    for act in (lambda: named_config("method", path), lambda: configure("method", path, {})):
        with pytest.raises(ValueError, match=r"method 'made_up\.named' has a setting called 'name'.*rename it"):
            act()


# ---- presets


def test_presets_in_folders_go_by_their_folder_and_their_name():
    assert {"demo", "paper/mnist", "paper/mnist_federated", "paper/fedslop"} <= set(preset_names())
    assert all((CONF / "experiment" / f"{name}.yaml").is_file() for name in preset_names())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("experiment=mnist", "no preset 'mnist'"),
        ("experiment=paper/mnst", "did you mean 'paper/mnist'"),
        ("experiment=paper", "no preset 'paper'"),
        ("experiment=null", "no preset 'null'"),
        ("experiment=demo,paper/fedslob", "did you mean 'paper/fedslop'"),
    ],
)
def test_a_preset_that_is_not_there_names_the_nearest(override, words):
    with pytest.raises(ValueError, match=words):
        check_overrides([override], CompareSettings, default_plugins("compare"))


@pytest.mark.parametrize("name", [*preset_names(), "demo,paper/mnist"])
def test_a_preset_that_is_there_is_taken(name):
    check_overrides([f"experiment={name}"], CompareSettings, default_plugins("compare"))
    assert names_preset(["rounds=3", f"experiment={name}"])
    assert not names_preset(["rounds=3", "name=experiment"])


# ---- settings as overrides, which is how they travel to a ServerApp

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cs", "Cc"]), max_size=12)
SAFE = TEXTS.filter(lambda text: "${" not in text)


LAYERS = st.from_regex(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)?", fullmatch=True)
FREE = {
    "name": SAFE,
    "out": st.none() | SAFE,
    "targets": SAFE | st.lists(SAFE, max_size=3),
    "dense": st.lists(SAFE, max_size=3),
    "ranks": st.dictionaries(LAYERS, st.integers(1, 64), max_size=3),
    "lr": st.floats(1e-12, 1e12),
    "seed": st.integers(0, 10**9),
    "exact": st.booleans(),
    "target_accuracies": st.lists(st.floats(0, 1), max_size=3),
    "client_ranks": st.none() | st.lists(st.integers(1, 64), max_size=3)
    | st.dictionaries(st.integers(1, 64), st.floats(0, 1), min_size=1, max_size=3),
    "client_lr_scales": st.lists(st.floats(1e-3, 10), max_size=3),
    "server": st.builds(ServerSettings, rule=st.sampled_from(RULES), lr=st.floats(1e-3, 10), tau=st.floats(1e-9, 1)),
    "memory": st.builds(MemorySettings, feedback=st.sampled_from(FEEDBACKS), whole_probability=st.floats(0.1, 1)),
    "robust": st.builds(RobustSettings, aggregate=st.sampled_from(AGGREGATES), trim=st.integers(0, 3)),
    "privacy": st.builds(PrivacySettings, level=st.sampled_from(LEVELS), adaptive=st.booleans()),
}  # fmt: skip


@given(st.fixed_dictionaries(FREE), st.sampled_from(["a", "b", "auto"]), st.floats(0.01, 1))
@hypothesis_settings(max_examples=40, deadline=None)
def test_settings_survive_the_trip_as_one_text(values, side, share):
    compressed = {"uplink": ("top_k", {"share": share}), "downlink": "int8"}
    chosen = settings(method=("rac_lora", {"side": side}), runtime="simulation", **compressed, **values)
    chosen.sketch.law = "gaussian"
    text = shlex.join(to_overrides(chosen))
    found = compose(shlex.split(text))
    assert plain_values(found) == plain_values(chosen)


def test_a_plug_in_from_outside_survives_the_trip():
    chosen = settings(model=("fedraclora.models.mlp", {"hidden": [7]}))
    assert plain_values(compose(to_overrides(chosen))) == plain_values(chosen)


def test_defaults_are_those_of_the_command_line():
    assert compose([]).method.name == "rac_lora"
    assert compose([]).runtime.name == "in_process"


def test_overrides_that_cannot_be_used_are_refused_with_what_is_right():
    with pytest.raises(ValueError, match="did you mean 'rounds'"):
        compose(["round=3"])
    with pytest.raises(ValueError, match="cannot be used"):
        compose(["rounds=many"])


def test_a_text_that_hydra_would_take_for_a_reference_is_refused():
    chosen = settings()
    chosen.name = "${seed}"
    with pytest.raises(ValueError, match="reference"):
        to_overrides(chosen)
