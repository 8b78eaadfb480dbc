"""Plug-ins: one module a plug-in, found by its file name, or by its dotted path when it lives outside the project.

A plug-in module defines `Config`, a plain dataclass of settings, and `build(config, ...)`. The folder is the list.
"""

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

CONTRACT = ("Config", "build")


class UnknownPlugin(ValueError):
    """A name that leads to no plug-in; the text says what would."""


def names(package: str) -> list[str]:
    """Return the sorted names of the plug-ins in `package`, such as `fedraclora.models`.

    The files are read but not imported, so that listing costs nothing and a broken optional library hides no plug-in.
    Modules whose names start with `_`, and modules without a top-level `Config` and `build`, are helpers and left out.
    """
    files = [file for folder in _folders(package) for file in folder.glob("*.py") if not file.stem.startswith("_")]
    return sorted(file.stem for file in files if not _missing(_top_level_names(file)))


def find(package: str, name: str) -> ModuleType:
    """Return the plug-in `name` of `package`, or the module anywhere on the path that a dotted `name` leads to.

    Raises UnknownPlugin for a name that is not in the package (with the nearest and all valid names), a dotted path
    that cannot be imported (with the cause), and a module that lacks `Config` or `build`.
    """
    module = _import_dotted(package, name) if "." in name else _import_plain(package, name)
    missing = _missing(vars(module))
    if missing:
        raise UnknownPlugin(
            f"{module.__name__} is not a plug-in: it does not define {' and '.join(missing)}; "
            f"a plug-in defines a dataclass Config and a function build(config, ...). {nearest(name, names(package))}"
        )
    return module


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return what to tell someone who wrote `name` where one of `valid` was due, nearest name first."""
    choices = sorted(valid)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(choices) or 'none'}"


def _import_plain(package: str, name: str) -> ModuleType:
    is_public = name.isidentifier() and not name.startswith("_")
    if not is_public or importlib.util.find_spec(f"{package}.{name}") is None:
        raise UnknownPlugin(f"no plug-in {name!r} in {package}; {nearest(name, names(package))}")
    return importlib.import_module(f"{package}.{name}")


def _import_dotted(package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module from outside may fail in any way; the cause is shown and kept
        raise UnknownPlugin(
            f"cannot import the plug-in {name!r}: {type(error).__name__}: {error}; give the dotted path of a module "
            f"that can be imported, or a plug-in of {package} ({nearest(name, names(package))})"
        ) from error


def _folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise UnknownPlugin(f"{package!r} is not a package, so it holds no plug-ins")
    return [Path(location) for location in spec.submodule_search_locations]


def _missing(defined: Iterable[str]) -> list[str]:
    present = set(defined)
    return [name for name in CONTRACT if name not in present]


def _top_level_names(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8"), filename=str(file)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):  # a variant may take its Config from the plug-in it varies
            found.update(alias.asname or alias.name for alias in node.names)
    return found
