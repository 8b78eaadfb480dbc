"""The folder that `flwr run` bundles: the checkout, or one put together from an installed package."""

import shutil
from pathlib import Path

import fedraclora

FOLDERS = ("strategies", "clients", "experiments")


def app_folder(draft: Path) -> Path:
    """Return the folder of the app; where the project is installed from a wheel it is put together in `draft`.

    A wheel keeps three of the four folders below `fedraclora/_app`, and Flower wants them side by side.
    """
    package = Path(fedraclora.__file__).resolve().parent
    carried = package / "_app"
    if not carried.is_dir():
        return package.parent
    skip = shutil.ignore_patterns("__pycache__", "_app")
    shutil.copytree(package, draft / "fedraclora", ignore=skip, dirs_exist_ok=True)
    for name in FOLDERS:
        shutil.copytree(carried / name, draft / name, ignore=skip, dirs_exist_ok=True)
    shutil.copy(carried / "pyproject.toml", draft / "pyproject.toml")
    return draft
