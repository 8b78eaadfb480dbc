"""The models of `fedraclora budget`: whatever follows `model=`, as a module whose numbers nobody needs.

A preset of shapes (`experiments/conf/shapes`), a YAML file of such shapes, one of the project's models or a plug-in of
one's own, or the dotted path of anything that gives an `nn.Module` when called.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from experiments.forecast import Known
from experiments.groups import CONF, GROUPS
from experiments.problem import check_choices, load_dataset, make_setup
from experiments.settings import BudgetSettings
from fedraclora.plugins import CONTRACT, find, names, nearest
from fedraclora.setup import hold_out_own, split_dataset
from fedraclora.shapes import META, TARGETS, module_of_shapes

SHAPES = CONF / "shapes"
YAML = (".yaml", ".yml")


def shape_presets() -> list[str]:
    """Return the names of the models that are here as shapes."""
    return sorted(path.stem for path in SHAPES.glob("*.yaml"))


def split_model(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the model that is no plug-in, as text, and the other arguments; None where it is a plug-in, or none.

    Raises ValueError for settings (`model.hidden=[5]`) of a model that has none: they would be those of the default.
    """
    chosen = [item.partition("=")[2] for item in arguments if item.startswith("model=")]
    if not chosen or _is_plugin(chosen[-1]):
        return None, list(arguments)
    own = [item for item in arguments if item.lstrip("+~").startswith("model.")]
    if own:
        raise ValueError(f"model={chosen[-1]} has no settings, only plug-ins have; take out {', '.join(own)}")
    return chosen[-1], [item for item in arguments if not item.startswith("model=")]


def known_model(
    text: str | None, settings: BudgetSettings, *, has_targets: bool = False
) -> tuple[Known, BudgetSettings]:
    """Return what is known of the model, and the settings with the targets that it names, unless they have their own.

    `text` is what `split_model` gave; without it the model is the settings' plug-in, built for their data set, whose
    split tells each client's examples. Raises ValueError for what gives no model.
    """
    check_choices(settings)
    known, chosen = _found(text, settings, has_targets=has_targets)
    return replace(known, model=known.model.to(getattr(torch, settings.dtype))), chosen


def _found(text: str | None, settings: BudgetSettings, *, has_targets: bool) -> tuple[Known, BudgetSettings]:
    if text is None:
        return _plugin_model(settings), settings
    if text in shape_presets():
        return _model_of_shapes(SHAPES / f"{text}.yaml", settings, has_targets=has_targets)
    if text.endswith(YAML):
        return _model_of_shapes(Path(text), settings, has_targets=has_targets)
    if "." in text:
        return Known(_called(text)), settings
    valid = [*shape_presets(), *names(GROUPS["model"])]
    raise ValueError(f"model={text!r} is no model; {nearest(text, valid)}; or a YAML file of shapes, or a dotted path")


def _is_plugin(text: str) -> bool:
    if text in names(GROUPS["model"]):
        return True
    if "." not in text or text.endswith(YAML):
        return False
    try:
        return all(hasattr(importlib.import_module(text), name) for name in CONTRACT)
    except Exception:  # noqa: BLE001
        # Whatever a module from outside fails with is said when it is called.
        return False


def _plugin_model(settings: BudgetSettings) -> Known:
    dataset = load_dataset(settings)
    setup = make_setup(settings, dataset)
    plugin: Any = find(GROUPS["model"], settings.model.name)
    shape, outputs = dataset.input_shape, dataset.num_outputs
    module = _on_meta(lambda: plugin.build(settings.model, input_shape=shape, num_outputs=outputs))
    split = split_dataset(setup.partition, dataset, num_clients=settings.num_clients)
    rows, _ = hold_out_own(dataset.train, dict(enumerate(split.indices)), setup)
    return Known(module, [len(rows[client]) for client in sorted(rows)])


def _model_of_shapes(path: Path, settings: BudgetSettings, *, has_targets: bool) -> tuple[Known, BudgetSettings]:
    if not path.is_file():
        raise ValueError(f"model={path}: there is no such file; the models here are {', '.join(shape_presets())}")
    try:
        description = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML library raises its own, as for a name that is there twice
        raise ValueError(f"model={path} cannot be read: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"model={path} holds no mapping; expected layers, tensors and targets")
    found = {str(key): value for key, value in description.items()}
    try:
        module = module_of_shapes(found)
    except ValueError as error:
        raise ValueError(f"model={path.name}: {error}") from error
    targets = settings.targets if has_targets else found.get(TARGETS, settings.targets)
    return Known(module), replace(settings, targets=targets)


def _called(path: str) -> nn.Module:
    """Return what the callable at a dotted path gives."""
    make = _imported(path)
    if not callable(make) or isinstance(make, nn.Module):
        raise ValueError(f"model={path} is a {type(make).__name__}; expected a function or class that gives a module")
    needed = _needed(make)
    if needed:
        raise ValueError(
            f"model={path} cannot be called without arguments (it needs {', '.join(needed)}); name a function of yours "
            "that gives the module"
        )
    try:
        return _on_meta(make)
    except ValueError as error:
        raise ValueError(f"model={path}: {error}") from error
    except Exception as error:  # a constructor from outside may fail in any way
        raise ValueError(f"model={path} cannot be made: {type(error).__name__}: {error}") from error


def _imported(path: str) -> Any:  # noqa: ANN401
    owner, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(owner)
        # A plug-in whose own imports fail is a module that `owner` does not have: importing it tells the cause.
        return getattr(module, name) if hasattr(module, name) else importlib.import_module(path)
    except Exception as error:  # a module from outside may fail in any way
        raise ValueError(f"model={path} cannot be imported: {type(error).__name__}: {error}") from error


def _needed(make: Callable[..., Any]) -> list[str]:
    """Return the arguments without which `make` cannot be called, as far as its signature tells."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # written in C
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [item.name for item in parameters if item.default is item.empty and item.kind not in optional]


def _on_meta(make: Callable[[], Any]) -> nn.Module:
    """Return what `make` gives, made without numbers where its constructor can be run so."""
    try:
        with META:
            module = make()
    except Exception:  # noqa: BLE001
        # Constructors that look at numbers fail in many ways (NumPy: TypeError); what is truly wrong fails again here.
        module = make()
    if not isinstance(module, nn.Module):
        raise ValueError(f"a model has to be a torch.nn.Module; found {type(module).__name__}")
    return module.to(META)
