"""Break the code in ways that have gone unnoticed elsewhere, and see that a test fails each time.

`python tests/mutate.py` (or `make mutations`) copies the tree, applies one mutation at a time and runs the tests that
should notice. It prints a line for each, and fails where a mutation survives.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fedraclora", "strategies", "clients", "experiments", "tests", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Edit:
    """One place to break: `old` stands exactly once in `file`, and becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """A defect by name, the places that make it, and the tests of which at least one must fail."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


ORACLE = "tests/conformance/test_oracle.py"
MUTATIONS = (
    Mutation(
        "drop alpha / r",
        (
            Edit(
                "fedraclora/chain.py",
                "materialize(term.lora_b, weight) * term.scale",
                "materialize(term.lora_b, weight)",
            ),
        ),
        (ORACLE,),
    ),
    Mutation(
        "drop one client",
        (Edit("fedraclora/aggregate.py", "    for client in others:\n", "    for client in others[:-1]:\n"),),
        (ORACLE,),
    ),
    Mutation(
        "swap the factors",
        (
            Edit(
                "fedraclora/plan.py",
                'PARTS = {"a": ("lora_a",), "b": ("lora_b",),',
                'PARTS = {"a": ("lora_b",), "b": ("lora_a",),',
            ),
        ),
        (ORACLE,),
    ),
    Mutation(
        "draw another A within the round",
        (
            Edit(
                "clients/replica.py",
                "        return materialize(factor, like).to(self._device)",
                "        again = dataclasses.replace(factor, link=99) if hasattr(factor, 'link') else factor\n"
                "        return materialize(again, like).to(self._device)",
            ),
            Edit("clients/replica.py", "import logging\n", "import dataclasses\nimport logging\n"),
        ),
        (ORACLE,),
    ),
    Mutation(
        "keep stale momentum",
        (
            Edit("fedraclora/plan.py", 'training.moments != "reset"', 'training.moments != "never"'),
            Edit("clients/cohort.py", 'if training.moments != "reset" else {}', "if training else {}"),
        ),
        (ORACLE, "tests/clients/test_cohort.py"),
    ),
    Mutation(
        "count every client alike",
        (
            Edit(
                "strategies/advancing.py",
                "weight = 1.0 if is_uniform else float(reply.num_examples)",
                "weight = 1.0",
            ),
        ),
        (ORACLE,),
    ),
    Mutation(
        "keep the first client of a stack only",
        (Edit("strategies/_factors.py", "    parts = list(products)\n", "    parts = list(products)[:1]\n"),),
        ("tests/strategies/test_methods.py",),
    ),
    Mutation(
        "forget the residual of error feedback",
        (Edit("fedraclora/upload.py", "tensor - decoded[key] for key, tensor", "tensor - tensor for key, tensor"),),
        ("tests/fedraclora/test_upload.py",),
    ),
    Mutation(
        "forget in a dry run what clients keep of the open link",
        (
            Edit(
                "strategies/dry_run.py",
                ", self.state.held_open[partition] = self.chain.num_links, self.chain.version",
                " = self.chain.num_links",
            ),
        ),
        ("tests/strategies/test_dry_run.py",),
    ),
    Mutation(
        "add half of the noise",
        (Edit("fedraclora/privacy.py", "std = privacy.update_noise * clip", "std = privacy.update_noise * clip / 2"),),
        ("tests/conformance/test_privacy_runs.py",),
    ),
)


def is_caught(mutation: Mutation, tree: Path) -> bool:
    """Return whether a test fails in a copy of the tree with the mutation in it. Raises ValueError for a stale one."""
    originals = {edit.file: (tree / edit.file).read_text() for edit in mutation.edits}
    try:
        for edit in mutation.edits:
            text = (tree / edit.file).read_text()
            if text.count(edit.old) != 1:
                raise ValueError(f"{mutation.name}: {edit.old!r} stands {text.count(edit.old)} times in {edit.file}")
            (tree / edit.file).write_text(text.replace(edit.old, edit.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        # 1 is a failed test; anything else (no tests, a file that cannot be read) is no verdict.
        if done.returncode not in (0, 1):
            raise ValueError(f"{mutation.name}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}")
        return done.returncode == 1
    finally:
        for file, text in originals.items():
            (tree / file).write_text(text)


def copy_tree(target: Path) -> Path:
    """Copy what the tests need to `target`, and return it."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def main() -> int:
    """Try every mutation; return 1 where one survives."""
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        for mutation in MUTATIONS:
            caught = is_caught(mutation, tree)
            sys.stdout.write(f"{'caught  ' if caught else 'SURVIVED'}  {mutation.name}\n")
            sys.stdout.flush()
            survivors += [] if caught else [mutation.name]
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
