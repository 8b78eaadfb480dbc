"""The folder that a run writes to, and whether it may go on there."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.groups import plain_values
from experiments.settings import Settings

# What may differ between a run and its continuation: everything else would make another run of it.
MAY_CHANGE = {
    *("resume", "out", "name", "rounds", "budget_mib", "uplink_mib", "per_client_mib"),
    *("target_accuracies", "keep_versions", "snapshot_every", "timeout_s", "connect_s"),
}


def find_folder(settings: Settings) -> Path:
    """Return the folder to write to: `out`, or a new one below `runs/<name>`, or with `resume` the newest there.

    Raises ValueError where it already holds a run that is not to be resumed.
    """
    if settings.out is not None:
        folder = Path(settings.out)
        if not settings.resume and folder.exists() and any(folder.iterdir()):
            raise ValueError(f"out={folder} is not empty; continue that run with resume=true, or name another folder")
        return folder
    parent = Path("runs") / settings.name
    earlier = sorted(path.parent for path in parent.glob("*/settings.yaml"))
    if settings.resume:
        if not earlier:
            raise ValueError(f"resume=true found no run in {parent}; name its folder with out=PATH")
        return earlier[-1]
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    candidates = (parent / (stamp if not number else f"{stamp}_{number}") for number in range(1000))
    return next(path for path in candidates if not path.exists())


def check_same_run(folder: Path, settings: Settings) -> None:
    """Raise ValueError where the folder's settings differ from these in something that decides the result."""
    before = OmegaConf.to_container(OmegaConf.load(folder / "settings.yaml"))
    after = OmegaConf.to_container(OmegaConf.create(plain_values(settings)))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    # A deployment may have moved: its addresses decide nothing.
    before["runtime"], after["runtime"] = _name_of(before.get("runtime")), _name_of(after["runtime"])
    if _is_same_start(before, after):
        before["start_from"] = after["start_from"]
    for key in sorted((before.keys() | after.keys()) - MAY_CHANGE, key=str):
        if before.get(key) != after.get(key):
            raise ValueError(
                f"resume=true, but {key} was {before.get(key)} in {folder} and is {after.get(key)} now; "
                "give the same settings, or start a new run in another folder"
            )


def _is_same_start(before: dict[Any, Any], after: dict[Any, Any]) -> bool:
    """Return whether two runs start from the same path, or from one that moved together with the run's folder."""
    starts, outs = [[run.get(key) for run in (before, after)] for key in ("start_from", "out")]
    if None in starts:
        return False
    full = [Path(str(start)).resolve() for start in starts]
    if full[0] == full[1] or None in outs:
        return full[0] == full[1]
    from_out = [os.path.relpath(start, Path(str(out)).resolve()) for start, out in zip(full, outs, strict=True)]
    return from_out[0] == from_out[1]


def _name_of(runtime: Any) -> Any:  # noqa: ANN401
    return runtime.get("name") if isinstance(runtime, dict) else runtime
