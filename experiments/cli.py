"""The console command: `fedraclora run | compare | budget | report | replay | theory | doctor | credentials`."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.budget import budget
from experiments.budget_models import known_model, split_model
from experiments.compare import compare
from experiments.credentials import write_credentials
from experiments.doctor import examine
from experiments.groups import CONF, allow_new_keys, check_overrides, default_plugins, names_preset, register
from experiments.progress import Display, beside, start_logging
from experiments.replay import replay
from experiments.report import main_report
from experiments.run import run
from experiments.settings import BudgetSettings, CompareSettings, Settings
from experiments.stored import is_stored, read_runs, store
from experiments.theory_page import write_theory
from fedraclora.ledger import MIB
from fedraclora.plugins import nearest

FAILED, BAD_USE, STOPPED = 1, 2, 130

USAGE = """\
fedraclora: what accuracy does a byte buy? Federated RAC-LoRA and its rivals, every byte counted.

  fedraclora run [KEY=VALUE ...]          train one method; results in runs/run/<date_time> or out=PATH
  fedraclora compare [KEY=VALUE ...]      methods x seeds on the same data: a table and report.html
  fedraclora run experiment=PRESET [KEY=VALUE ...]
                                          the same as compare experiment=PRESET: a preset is a comparison
  fedraclora budget [KEY=VALUE ...]       what each method would send, and how long it would take; nothing is trained
  fedraclora report RUN... [out=PATH] [store=PATH]
                                          report.html from finished runs; store: their rounds as small data,
                                          from which `report PATH` makes the page again
  fedraclora replay RUN [export=PATH] [version=N]
                                          rebuild the model from its log and verify its digest
  fedraclora theory [out=runs/theory]     the theorems and bounds against measurements, as one page of plots
  fedraclora doctor                       what works here: packages, runtimes, a round over the loopback interface
  fedraclora credentials OUT [clients=2] [hosts=localhost,127.0.0.1] [days=30]
                                          certificates and keys for trying a secured deployment out

Examples:
  fedraclora run method=rac_lora dataset=mnist_5k model=mlp rounds=20 num_clients=50 fraction=0.2 rank=8
  fedraclora compare "methods=[rac_lora,ffa_lora,fed_it,full]" seeds=3 budget_mib=50
  fedraclora compare experiment=demo
  fedraclora budget model=roberta_base "methods=[rac_lora,fed_it,full]" num_clients=50 fraction=0.2 rounds=100 rank=8
  fedraclora run experiment=paper/mnist dataset.path=mnist.npz

`fedraclora run --help`, `compare --help` and `budget --help` list every setting; --cfg job prints them as they
would be used, -m sweeps over a=1,2,3, and resume=true continues what was interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console command and return its exit code: 0, 1 for a failure, 2 for bad use, 130 where interrupted."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    console = Console(stderr=True)
    start_logging(console)
    if "" not in sys.path:
        sys.path.insert(0, "")
    commands: dict[str, Callable[[list[str], Console], None]] = {
        "run": _run,
        "compare": _compare,
        "budget": _budget,
        "theory": _theory,
        "report": _report,
        "replay": _replay,
        "doctor": _doctor,
        "credentials": _credentials,
    }
    if command in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    try:
        if command not in commands:
            raise ValueError(f"unknown command {command!r}; {nearest(command, commands)}")
        commands[command](rest, console)
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"fedraclora {command}: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return BAD_USE if isinstance(error, ValueError) else FAILED
    except KeyboardInterrupt:
        console.print("interrupted; the same command with resume=true continues from the last whole round")
        return STOPPED
    return 0


def _run(arguments: list[str], console: Console) -> None:
    if names_preset(arguments):
        # A preset is a comparison.
        _compare(arguments, console)
        return

    def job(settings: Settings) -> None:
        with Display(console, logs_rounds=True) as display:
            display.start_run(f"{settings.method.name} on {settings.dataset.name}")
            summary = run(settings, display)
        if not summary:
            return
        accuracy, loss = summary["final_test_accuracy"], summary["final_test_loss"]
        score = f"accuracy {accuracy:.4f}" if accuracy is not None else f"loss {loss:.6g}"
        score = ", ".join([score, *beside(summary, "final_personal_accuracy", "epsilon")])
        log = logging.getLogger("fedraclora")
        log.info(
            "%s after %d rounds: %s, %.3f MiB up, %.3f MiB down; chain %s",
            summary["status"], summary["num_rounds"], score, summary["uplink_bytes"] / MIB,
            summary["downlink_bytes"] / MIB, summary["chain_digest"][:12],
        )  # fmt: skip

    _hydra("run", arguments, Settings, job)


def _compare(arguments: list[str], console: Console) -> None:
    _hydra("compare", arguments, CompareSettings, lambda settings: compare(settings, console))


def _budget(arguments: list[str], console: Console) -> None:
    model, others = split_model(arguments)

    def job(settings: BudgetSettings) -> None:
        known, chosen = known_model(model, settings, has_targets=any(item.startswith("targets=") for item in others))
        budget(chosen, known, console, model=model)

    _hydra("budget", others, BudgetSettings, job)


def _theory(arguments: list[str], console: Console) -> None:
    others, options = _split(arguments, ("out",))
    if others:
        raise ValueError(f"theory takes only out=PATH; found {others}")
    page = write_theory(Path(options.get("out", "runs/theory")), console)
    console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


def _hydra(command: str, arguments: list[str], settings: type, job: Callable[[Any], object]) -> None:
    """Compose the settings of a command with Hydra and call `job` with them; errors of the job pass through."""
    register(arguments)
    check_overrides(arguments, settings, default_plugins(command))
    errors: list[Exception] = []

    def entry(config: DictConfig) -> None:
        if errors:
            return
        try:
            job(OmegaConf.to_object(config))
        except Exception as error:  # noqa: BLE001
            # Hydra would print a traceback and exit; the caller's message says it better.
            errors.append(error)

    flags = [item for item in arguments if item in ("-m", "--multirun")]
    # Hydra's parser wants this flag before the overrides.
    others = allow_new_keys([item for item in arguments if item not in flags], settings)
    argv, sys.argv = sys.argv, [f"fedraclora {command}", *flags, *others]
    try:
        hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")(entry)()
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise ValueError("these settings cannot be used (see above)") from stop
    finally:
        sys.argv = argv
    if errors:
        raise errors[0]


def _report(arguments: list[str], console: Console) -> None:
    folders, options = _split(arguments, ("out", "store"))
    if not folders:
        raise ValueError("name the folders of finished runs: fedraclora report RUN... [out=PATH] [store=PATH]")
    runs = read_runs([found for folder in folders for found in _run_folders(Path(folder))])
    if "store" in options:
        store(runs, Path(options["store"]))
    out = Path(options.get("out", Path(folders[0]) / "report.html"))
    main_report(runs, out)
    console.print(f"report: {out}")


def _run_folders(folder: Path) -> list[Path]:
    """Return the run in a folder, or all runs of the comparison in it, in its order of methods (tuning left out)."""
    if is_stored(folder) or (folder / "summary.json").exists() or not (folder / "settings.yaml").exists():
        return [folder]
    settings = OmegaConf.to_container(OmegaConf.load(folder / "settings.yaml"))
    methods = settings.get("methods", []) if isinstance(settings, dict) else []
    return [path.parent for method in methods for path in sorted((folder / method).glob("seed_*/summary.json"))]


def _replay(arguments: list[str], console: Console) -> None:
    runs, options = _split(arguments, ("export", "version"))
    if len(runs) != 1:
        raise ValueError("name the folder of one finished run: fedraclora replay RUN [export=PATH] [version=N]")
    version = int(options["version"]) if "version" in options else None
    for line in replay(Path(runs[0]), version=version, export=options.get("export")):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _doctor(arguments: list[str], console: Console) -> None:
    if arguments:
        raise ValueError(f"doctor takes no arguments; found {arguments}")
    if not examine(console):
        raise RuntimeError("something above does not work here")


def _credentials(arguments: list[str], console: Console) -> None:
    folders, options = _split(arguments, ("clients", "hosts", "days"))
    if len(folders) != 1:
        raise ValueError("name one folder: fedraclora credentials OUT [clients=2] [hosts=HOST,HOST] [days=30]")
    hosts = options.get("hosts", "localhost,127.0.0.1").split(",")
    clients, days = int(options.get("clients", "2")), int(options.get("days", "30"))
    for name, use in write_credentials(Path(folders[0]), clients=clients, hosts=hosts, days=days).items():
        console.print(f"{name}: {use}", markup=False, highlight=False, soft_wrap=True)


def _split(arguments: Sequence[str], known: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    if "--help" in arguments or "-h" in arguments:
        raise ValueError(f"see `fedraclora --help`; the options here are {', '.join(f'{name}=...' for name in known)}")
    options = dict(item.split("=", 1) for item in arguments if "=" in item)
    for key in options:
        if key not in known:
            raise ValueError(f"unknown option {key!r}; {nearest(key, known)}")
    return [item for item in arguments if "=" not in item], options
