"""Rebuild a run's model from its log alone, and check that it is the one the run ended with."""

from pathlib import Path

from fedraclora import sketch
from fedraclora.files import write_tensors
from fedraclora.finished import load_run


def replay(folder: Path, *, version: int | None = None, export: str | None = None) -> list[str]:
    """Return what was verified, in lines; write the merged weights to `export` (safetensors) where it is given.

    Raises ValueError where the log is damaged or does not end at the digest of the summary.
    """
    run = load_run(folder)
    chain = run.chain(version)
    is_last = chain.version == run.versions[-1]
    if is_last and chain.digest != run.summary["chain_digest"]:
        raise ValueError(
            f"{folder} ends at {chain.digest[:12]} by its log, and at {run.summary['chain_digest'][:12]} by its summary"
        )
    weights = run.model(version).state_dict()
    lines = [
        f"version {chain.version} of {run.versions[-1]}: {chain.num_links} closed links"
        + ("" if chain.open is None else " and an open one"),
        f"chain digest {chain.digest}: verified" + (" against the summary" if is_last else " against the index"),
        f"weights digest {sketch.digest_all(weights)}",
    ]
    if export is not None:
        path = Path(export)
        write_tensors(path, weights, {"chain_digest": chain.digest, "version": str(chain.version)})
        lines.append(f"weights written to {path}")
    return lines
