"""A comparison: methods times seeds on the same splits, initial weights, cohorts and batch orders.

Each run is an ordinary run in a folder of its own, so a comparison can be interrupted and resumed like one. Where
asked, each method's learning rate is tuned first: on examples held out from training, with other seeds, over a grid
that grows until its best value lies inside it. Where asked, a model is trained first, once a seed, and every run of
that seed, those for tuning included, starts from it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from experiments.folders import check_same_run, find_folder
from experiments.groups import GROUPS, configure, plain_values
from experiments.outcomes import DIVERGED, FINISHED, Diverged
from experiments.problem import prepare
from experiments.progress import Display
from experiments.report import write_report
from experiments.results import load_runs
from experiments.run import run
from experiments.settings import CompareSettings, Settings, name_of
from experiments.tables import comparison_table, render_table
from fedraclora.files import read_json, write_atomically, write_json
from fedraclora.finished import check_weights_fit
from fedraclora.plugins import names, nearest
from strategies.state import BudgetTooSmall

log = logging.getLogger("fedraclora")

# Far from the seeds of any comparison, so that tuning and comparing share no split, weights or cohorts.
TUNING_SEED = 1_000_000
# Folders of a comparison that are none of a method.
PRETRAIN, TUNING = "pretrain", "tuning"
# Of these, the comparison's own value is for the compared runs alone.
LIMITS = {"budget_mib": None, "uplink_mib": None, "per_client_mib": None}
NOT_PRETRAINED = {**LIMITS, "verify": False, "devices": "none", "deadline_s": 0.0}
Score = Callable[[float], float]


@dataclass(frozen=True)
class Tuned:
    """A method's scores by learning rate, and the best one; `is_interior`: both neighbours were tried and are worse."""

    scores: dict[float, float]
    best: float
    is_interior: bool


def compare(settings: CompareSettings, console: Console) -> Path:
    """Run the comparison and write its tables and its report; return the folder.

    Methods that cannot afford a round are shown with the reason. Raises ValueError for settings that cannot be run,
    before any training starts.
    """
    _check(settings)
    folder = find_folder(settings)
    if settings.resume and (folder / "settings.yaml").exists():
        check_same_run(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "settings.yaml", OmegaConf.to_yaml(OmegaConf.create(plain_values(settings))).encode())
    refused: dict[str, str] = {}
    seeds = range(settings.seed, settings.seed + settings.seeds)
    finished: list[Path] = []
    with Display(console, logs_rounds=False) as display:
        _pretrain_all(settings, folder, display)
        rates = _tune_all(settings, folder, display)
        for seed, method in product(seeds, settings.methods):
            one = one_run(_started(settings, folder, seed), folder, method, seed, rates.get(method))
            if method not in refused and (path := _run_one(one, display, refused)) is not None:
                finished.append(path)
    write_json(folder / "refused.json", refused)
    _report(settings, folder, finished, refused, console)
    return folder


def _check(settings: CompareSettings) -> None:
    """Raise ValueError for anything that cannot be run."""
    check_names(settings)
    for method in settings.methods:
        _grid(settings, method)
    _check_models(settings)
    # The methods share the splits, so one method shows whether every seed has a split that works.
    for seed in range(settings.seed + 1, settings.seed + settings.seeds):
        prepare(one_run(settings, Path(), settings.methods[0], seed, None))
    if settings.tune is not None:
        for seed in _tuning_seeds(settings):
            prepare(_tuning(one_run(settings, Path(), settings.methods[0], seed, None)))
    for seed in set(_pretrained_seeds(settings)) - {settings.seed}:
        prepare(_pretraining(settings, Path(), seed))


def check_names(settings: CompareSettings) -> None:
    """Raise ValueError for methods, variants and settings of methods that do not go together."""
    if not settings.methods or len(set(settings.methods)) != len(settings.methods) or settings.seeds < 1:
        raise ValueError(
            f"methods={settings.methods} must name methods, each once, and seeds={settings.seeds} be positive"
        )
    if settings.label is not None and len(settings.methods) > 1:
        raise ValueError(f"label={settings.label!r} would give all methods one name; name them with variants")
    plugins = {str(one_run(settings, Path(), method, settings.seed, None).method.name) for method in settings.methods}
    # Those that a preset has for methods which are left out do no harm; a misspelt one would.
    known = {*settings.methods, *settings.variants, *plugins, *names(GROUPS["method"])}
    for name in settings.method_settings.keys() - known:
        raise ValueError(f"method_settings names {name!r}, which is no method; {nearest(name, known)}")
    taken = {PRETRAIN: settings.pretrain, TUNING: settings.tune is not None}
    wrong = [name for name in settings.methods if taken.get(name)]
    if wrong:
        raise ValueError(f"a variant is called {wrong[0]!r}, which is the name of a folder of its own; rename it")


def _check_models(settings: CompareSettings) -> None:
    """Prepare every method, and see that its model can start from the one trained first, if any."""
    first = prepare(_pretraining(settings, Path(), settings.seed)).model if settings.pretrain else None
    for method in settings.methods:
        model = prepare(one_run(settings, Path(), method, settings.seed, None)).model
        if first is not None and "start_from" not in settings.variants.get(method, {}):
            check_weights_fit(model, first.state_dict(), f"{PRETRAIN} for {method}")


def one_run(settings: CompareSettings, folder: Path, method: str, seed: int, lr: float | None) -> Settings:
    """Return the settings of one run of the comparison; `method` may be a variant."""
    one = _varied(settings, method, settings.variants.get(method, {}), lr)
    label = method if method in settings.variants else settings.label
    return replace(one, out=str(folder / method / f"seed_{seed}"), seed=seed, label=label)


def _varied(settings: CompareSettings, method: str, changes: Mapping[str, Any], lr: float | None) -> Settings:
    """Return the settings of a run that differ from the comparison's in `changes`, with that learning rate if any."""
    changes = dict(changes)
    plugin = changes.pop("method", method)
    if isinstance(plugin, Mapping) and "name" not in plugin:
        raise ValueError(f"{method} has method={dict(plugin)}, which names none; add name: METHOD")
    name, given = (plugin["name"], plugin) if isinstance(plugin, Mapping) else (plugin, {})
    # What is said of the method in this comparison, in the variant, and of the variant, the last word last.
    own = {**settings.method_settings.get(name, {}), **given, **settings.method_settings.get(method, {})}
    own.pop("name", None)
    shared = {item.name: deepcopy(getattr(settings, item.name)) for item in fields(Settings)}
    known = {**shared, "resume": True, "method": configure("method", name, own)}
    changed = {key: _changed(key, value, known) for key, value in changes.items()}
    return Settings(**{**known, **changed, "lr": changed.get("lr", settings.lr) if lr is None else lr})


def _changed(key: str, value: Any, known: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return a variant's value for a setting: a plug-in by name, some of a group's settings, or the value itself.

    What it does not say of a plug-in that the comparison has, too, is as there: `dataset.path` is said once.
    """
    if key not in known:
        raise ValueError(f"a variant sets {key!r}, which is no setting; {nearest(key, known)}")
    if key in GROUPS:
        given = dict(value) if isinstance(value, Mapping) else {"name": str(value)}
        name = str(given.pop("name", known[key].name))
        ours = plain_values(known[key]) if name == known[key].name else {}
        return configure(key, name, {item: own for item, own in {**ours, **given}.items() if item != "name"})
    if is_dataclass(known[key]) and isinstance(value, Mapping):
        names = [item.name for item in fields(known[key])]
        for name in value:
            if name not in names:
                raise ValueError(f"a variant sets {key}.{name}, which is no setting; {nearest(str(name), names)}")
        return replace(known[key], **_typed(key, plain_values(known[key]) | dict(value)))
    return _typed(key, value)


def _typed(key: str, value: Any) -> Any:  # noqa: ANN401
    """Return a setting's value in the type of the setting. Raises ValueError for one of another type."""
    try:
        typed = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Settings), {key: value}))
    except OmegaConfBaseException as error:
        raise ValueError(f"a variant sets {key}={value!r}: {error}") from error
    assert isinstance(typed, dict)
    return typed[key]


def _run_one(settings: Settings, display: Display, refused: dict[str, str]) -> Path | None:
    """Run one part of a comparison, unless it is done; return its folder, or None where no round is affordable."""
    assert settings.out is not None
    folder, method = Path(settings.out), name_of(settings)
    is_tuning = settings.eval_split == "validation" and settings.lr is not None
    purpose = f" tuning lr {settings.lr:g}" if is_tuning and method != PRETRAIN else ""
    display.start_run(f"{method} seed {settings.seed}{purpose}")
    if is_done(folder, settings.rounds):
        check_same_run(folder, settings)
        return folder
    try:
        run(settings, display)
    except BudgetTooSmall as error:
        refused[method] = str(error)
        log.warning("%s: %s", method, error)
        return None
    except Diverged as error:
        log.warning("%s seed %d: %s", method, settings.seed, error)
    display.end_run()
    return folder


def is_done(folder: Path, rounds: int) -> bool:
    """Return whether a run's folder holds a run of that many rounds, or one that diverged.

    One that its budget ended may go on with a larger one.
    """
    if not (folder / "summary.json").exists():
        return False
    summary = read_json(folder / "summary.json")
    return bool(summary["status"] == DIVERGED or (summary["status"] == FINISHED and summary["num_rounds"] >= rounds))


def _report(
    settings: CompareSettings, folder: Path, finished: Sequence[Path], refused: Mapping[str, str], console: Console
) -> None:
    if not finished:
        raise BudgetTooSmall("no method can afford a round: " + "; ".join(f"{k}: {v}" for k, v in refused.items()))
    runs = load_runs(finished)
    targets, budget = settings.target_accuracies, settings.budget_mib
    write_report(runs, folder / "report.html", title=settings.name, targets=targets, budget_mib=budget, refused=refused)
    console.print(render_table(comparison_table(runs, targets=targets, budget_mib=budget)))
    for method, reason in refused.items():
        console.print(f"{method}: {reason}")
    console.print(f"report: {folder / 'report.html'}")


# ---- a model for all to start from


def _started(settings: CompareSettings, folder: Path, seed: int) -> CompareSettings:
    """Return the settings with the place of the seed's pretrained model, where there is one, as what runs start from.

    The path is a full one: a server may run elsewhere.
    """
    if not settings.pretrain:
        return settings
    return replace(settings, start_from=str((folder / PRETRAIN / f"seed_{seed}").resolve()))


def _pretraining(settings: CompareSettings, folder: Path, seed: int) -> Settings:
    """Return the settings of the run that trains the seed's model.

    It has no limit on bytes unless it sets one: they are for what is compared.
    """
    changes = {**NOT_PRETRAINED, **settings.pretrain}
    fixed = sorted(changes.keys() & {"seed", "label", "out", "name", "resume"})
    if fixed:
        raise ValueError(f"pretrain sets {fixed}, which a comparison sets for every run of its own; leave them out")
    if "method" not in changes:
        raise ValueError(f"pretrain={settings.pretrain} names no method; add method: full, say")
    one = _varied(settings, PRETRAIN, changes, None)
    one = replace(one, out=str(folder / PRETRAIN / f"seed_{seed}"), seed=seed, label=PRETRAIN)
    # What tuning holds out must not be in the model either.
    return _tuning(one) if seed in _tuning_seeds(settings) else one


def _pretrained_seeds(settings: CompareSettings) -> list[int]:
    """Return the seeds for which a model is trained first."""
    if not settings.pretrain:
        return []
    tuning = [] if settings.tune is None else _tuning_seeds(settings)
    return [*tuning, *range(settings.seed, settings.seed + settings.seeds)]


def _pretrain_all(settings: CompareSettings, folder: Path, display: Display) -> None:
    """Train the models that the runs start from. Raises Diverged where one of them is not to be had."""
    for seed in _pretrained_seeds(settings):
        one, refused = _pretraining(settings, folder, seed), dict[str, str]()
        path = _run_one(one, display, refused)
        if path is None:
            raise BudgetTooSmall(f"{PRETRAIN} cannot be trained: {refused[PRETRAIN]}")
        if read_json(path / "summary.json")["status"] == DIVERGED:
            raise Diverged(f"{PRETRAIN} diverged, see {path}; no run can start from it: try a smaller pretrain.lr")
        if not pd.read_csv(path / "rounds.csv")["is_updated"].any():
            raise ValueError(f"{PRETRAIN} has trained nothing, see {path}; its rounds have no usable reply")


# ---- tuning


def _grid(settings: CompareSettings, method: str) -> list[float]:
    """Return the method's learning-rate grid, sorted; empty where it is not tuned."""
    grid = settings.tune.get(method) if isinstance(settings.tune, Mapping) else settings.tune
    if grid is None:
        return []
    rates = sorted({float(rate) for rate in grid})
    if len(rates) < 2 or rates[0] <= 0:
        raise ValueError(f"tune for {method} is {list(grid)}; it needs at least two different positive learning rates")
    return rates


def _tune_all(settings: CompareSettings, folder: Path, display: Display) -> dict[str, float]:
    """Tune every method that has a grid, write `tuning.csv`, and return the best learning rates."""
    rows: list[dict[str, Any]] = []
    best: dict[str, float] = {}
    for method in settings.methods:
        grid = _grid(settings, method)
        if not grid:
            continue
        tuned = tune(
            grid,
            partial(_score, settings, folder, display, method),
            settings.tune_extensions,
            refinements=settings.tune_refinements,
        )
        best[method] = tuned.best
        rows += [
            {"method": method, "lr": lr, "score": score, "is_best": lr == tuned.best, "is_interior": tuned.is_interior}
            for lr, score in sorted(tuned.scores.items())
        ]
        if not tuned.is_interior:
            log.warning("%s: the best learning rate %g lies at the edge of what was tried", method, tuned.best)
        log.info("%s: learning rate %g is the best of %s", method, tuned.best, sorted(tuned.scores))
    if rows:
        pd.DataFrame(rows).to_csv(folder / "tuning.csv", index=False)
    return best


def tune(grid: Sequence[float], score: Score, extensions: int, *, refinements: int = 0) -> Tuned:
    """Return the learning rate with the highest score; the grid grows, in its own ratio, while the best is at its end.

    At most `extensions` rates are added at either end. Then, `refinements` times, the geometric means of the best rate
    and its two neighbours are tried as well.
    """
    scores = {rate: score(rate) for rate in sorted(grid)}
    ratio = (max(scores) / min(scores)) ** (1 / (len(scores) - 1))
    added = {-1: 0, 1: 0}
    while (side := _edge(scores)) and added[side] < extensions:
        added[side] += 1
        rate = _rounded(_best(scores) * ratio**side)
        scores[rate] = score(rate)
    for _ in range(refinements):
        tried, best = sorted(scores), _best(scores)
        place = tried.index(best)
        for neighbour in tried[max(0, place - 1) : place] + tried[place + 1 : place + 2]:
            rate = _rounded((best * neighbour) ** 0.5)
            scores[rate] = score(rate)
    return Tuned(scores, _best(scores), is_interior=not _edge(scores))


def _best(scores: Mapping[float, float]) -> float:
    """Return the rate with the highest score, the smaller one of two that are equal."""
    return max(scores, key=lambda rate: (scores[rate], -rate))


def _edge(scores: Mapping[float, float]) -> int:
    """Return -1 or 1 where the best rate is the smallest or the largest that was tried, else 0."""
    best = _best(scores)
    return -1 if best == min(scores) else 1 if best == max(scores) else 0


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _score(settings: CompareSettings, folder: Path, display: Display, method: str, lr: float) -> float:
    """Return the mean validation accuracy over all rounds and tuning seeds (for regression, minus the loss).

    The mean over rounds is the area under the accuracy curve: within one method bytes grow with the rounds, so it
    rewards reaching any accuracy for few bytes. A run that diverged counts with its worst value for the rounds it
    did not do.
    """
    seeds = _tuning_seeds(settings)
    return sum(_score_one(settings, folder, display, (method, seed, lr)) for seed in seeds) / len(seeds)


def _tuning_seeds(settings: CompareSettings) -> range:
    return range(TUNING_SEED + settings.seed, TUNING_SEED + settings.seed + settings.tune_seeds)


def _tuning(one: Settings) -> Settings:
    """Return a run's settings with its test examples held out from training, and nothing measured beside them."""
    return replace(one, eval_split="validation", verify=False)


def _score_one(settings: CompareSettings, folder: Path, display: Display, which: tuple[str, int, float]) -> float:
    method, seed, lr = which
    one = _tuning(one_run(_started(settings, folder, seed), folder / TUNING / f"lr_{lr:g}", method, seed, lr))
    one = replace(one, rounds=settings.tune_rounds or settings.rounds)
    path = _run_one(one, display, {})
    if path is None:
        raise BudgetTooSmall(f"{method} cannot be tuned: no round is affordable")
    rounds = pd.read_csv(path / "rounds.csv")
    # A longer run that is there already serves as well.
    rounds = rounds[rounds["round"] <= one.rounds]
    summary = read_json(path / "summary.json")
    # Where there is no model for all, the clients' own models are what is tuned.
    accuracies = rounds["test_accuracy" if summary["is_global"] else "personal_accuracy"].dropna().tolist()
    values = accuracies or (-rounds["test_loss"].dropna()).tolist()
    if summary["status"] == DIVERGED:
        due = one.rounds // settings.eval_every + 1
        values = values + [min(values)] * max(0, due - len(values))
    return float(sum(values) / len(values))
