import dataclasses
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedraclora import plugins

PACKAGES = ["fedraclora.datasets", "fedraclora.models", "fedraclora.partitions"]
PLUGIN = "class Config:\n    size: int = 1\n\n\ndef build(config):\n    return 1\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package from outside with one plug-in, one variant of it, and four modules that are none."""
    folder = tmp_path / "outside_zoo"
    folder.mkdir()
    files = {
        "__init__": "",
        "lion": PLUGIN,
        "tiger": "from outside_zoo.lion import Config\ndef build(config):\n    return 2\n",
        "_private": PLUGIN,
        "helper": "def build(config):\n    return 3\n",
        "nested": "if True:\n    class Config: ...\n    def build(config): ...\n",
        "explodes": "raise RuntimeError('boom')\nclass Config: ...\ndef build(config): ...\n",
    }
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "outside_zoo"
    for name in [name for name in sys.modules if name.split(".")[0] == "outside_zoo"]:
        del sys.modules[name]


def test_names_are_the_sorted_modules_with_config_and_build(package):
    assert plugins.names(package) == ["explodes", "lion", "tiger"]


def test_listing_imports_no_plugin(package):
    plugins.names(package)
    assert not [name for name in sys.modules if name.startswith(f"{package}.")]


def test_names_refuses_what_is_no_package():
    with pytest.raises(plugins.UnknownPlugin, match="'no_such_package' is not a package"):
        plugins.names("no_such_package")
    with pytest.raises(plugins.UnknownPlugin, match=r"'fedraclora\.data' is not a package"):
        plugins.names("fedraclora.data")


def test_find_by_plain_and_by_dotted_name_is_the_same_module(package):
    assert plugins.find(package, "lion") is plugins.find("fedraclora.models", "outside_zoo.lion")
    assert plugins.find(package, "lion").build(None) == 1


def test_unknown_name_is_answered_with_the_nearest_and_all_valid_names(package):
    with pytest.raises(plugins.UnknownPlugin, match=r"'loin'.*did you mean 'lion'\? valid: explodes, lion, tiger"):
        plugins.find(package, "loin")


@pytest.mark.parametrize("name", ["", "_private", "__init__", "a/b", "lion-"])
def test_names_that_are_no_public_modules_are_unknown(package, name):
    with pytest.raises(plugins.UnknownPlugin, match="valid: explodes, lion, tiger"):
        plugins.find(package, name)


@pytest.mark.parametrize(
    ("name", "cause"),
    [("no_such.module", "ModuleNotFoundError"), ("outside_zoo.explodes", "boom"), (".lion", "relative"), ("a..b", "a")],
)
def test_dotted_path_that_cannot_be_imported_tells_the_cause(package, name, cause):
    with pytest.raises(plugins.UnknownPlugin, match=f"cannot import the plug-in '{name}'.*{cause}") as caught:
        plugins.find(package, name)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["helper", "outside_zoo.helper"])
def test_module_without_config_is_told_so(package, name):
    with pytest.raises(plugins.UnknownPlugin, match="does not define Config;"):
        plugins.find(package, name)


def test_module_without_both_is_told_so(package):
    with pytest.raises(plugins.UnknownPlugin, match="does not define Config and build;"):
        plugins.find(package, "os.path")


@given(valid=st.sets(st.text(string.ascii_lowercase, min_size=1), min_size=1), name=st.text())
def test_nearest_names_every_valid_name_and_suggests_one_of_them(valid, name):
    text = plugins.nearest(name, valid)
    hint, _, listed = text.rpartition("valid: ")
    assert listed.split(", ") == sorted(valid)
    assert hint == "" or any(hint == f"did you mean {choice!r}? " for choice in valid)


@given(valid=st.sets(st.text(string.ascii_lowercase, min_size=1), min_size=1))
def test_nearest_suggests_an_exact_match_first(valid):
    name = min(valid)
    assert plugins.nearest(name, valid).startswith(f"did you mean {name!r}?")


def test_nearest_of_nothing_says_so():
    assert plugins.nearest("a", []) == "valid: none"


def test_importing_plugins_loads_no_heavy_library():
    heavy = ["datasets", "flwr_datasets", "matplotlib", "mlxtend", "sklearn", "transformers"]
    modules = [f"{package}.{name}" for package in PACKAGES for name in plugins.names(package)]
    code = f"import sys, {', '.join(modules)}; print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("package_name", PACKAGES)
def test_every_listed_plugin_meets_the_contract(package_name):
    for name in plugins.names(package_name):
        module = plugins.find(package_name, name)
        settings = module.Config()
        assert dataclasses.is_dataclass(settings)
        assert all(field.name in module.Config.__doc__ for field in dataclasses.fields(settings))
        for field in dataclasses.fields(settings):
            setattr(settings, field.name, getattr(settings, field.name))  # a frozen Config refuses overrides


@pytest.mark.parametrize("package_name", PACKAGES)
def test_every_config_is_a_structured_config_whose_fields_can_be_overridden(package_name):
    omegaconf = pytest.importorskip("omegaconf")
    for name in plugins.names(package_name):
        config = plugins.find(package_name, name).Config
        node = omegaconf.OmegaConf.structured(config)
        assert omegaconf.OmegaConf.to_object(omegaconf.OmegaConf.merge(node, node)) == config()
