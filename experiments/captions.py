"""The sentences under tables: how to read them, and what the numbers in them are."""

import pandas as pd

from experiments.formats import (
    LEAST_SEEDS,
    format_number,
    measured_in,
    metric_of,
    reference_in,
    targets_of,
)
from experiments.paired import REFERENCE

MEANINGS = {
    "personal_accuracy": (
        "The personal accuracy is that of the clients' own models, after their local steps, on examples that they held "
        "out, over the cohort of the last round."
    ),
    "aggregation_gap": (
        "The aggregation gap is how far what a round merged is from the mean of the clients' own changes, relative to "
        "that mean, averaged over the rounds."
    ),
    "epsilon": "Epsilon is what the whole run spent of differential privacy, for its privacy.level and privacy.delta.",
}


def table_caption(table: pd.DataFrame) -> str:
    """Return the sentences that say how to read a comparison table."""
    return " ".join(part for part in (metric_caption(table), target_caption(table)) if part)


def metric_caption(table: pd.DataFrame) -> str:
    """Return the sentences about spreads, budgets, metrics and the bytes of whole runs."""
    metric, budget = metric_of(table), format_number(float(table["budget_mib"].iloc[0]))
    uplink = format_number(float(table["uplink_budget_mib"].iloc[0]))
    origin = "the budget" if bool(table["is_budget_given"].iloc[0]) else "the smallest total that a run spent"
    limit = "the limit" if bool(table["is_uplink_budget_given"].iloc[0]) else "the smallest that a run spent"
    quartiles = "; IQR: the middle half of the seeds" if (table["num_seeds"] >= LEAST_SEEDS).any() else ""
    sentences = [
        f"Medians over seeds, lowest to highest in brackets{quartiles}.",
        f"The {metric} at {budget} MiB ({origin}, uplink and downlink of all clients) is that of the last evaluated",
        "round within it; final is the last evaluated round, never the best one.",
        f"The mean {metric} over total and uplink is the area under the curve over bytes, for all methods from 0 to",
        f"{budget} MiB of the total and from 0 to {uplink} MiB of the uplink ({limit}), divided by that length: at",
        f"each byte the {metric} of the last evaluated round, before the first one that of the initial model, and",
        "after the end of a run that of its last one.",
    ]
    if table["num_unfinished"].any():
        sentences.append("A run that diverged shortens neither, and has its worst value from its last evaluation on.")
    sentences.append("Uplink, downlink and the catch-up in it are those of whole runs.")
    if metric != "accuracy":
        sentences.append("These runs report no accuracy, so accuracy targets do not apply.")
    return " ".join([*sentences, *(MEANINGS[name] for name in measured_in(table))])


def target_caption(table: pd.DataFrame) -> str:
    """Return the sentences about targets, or nothing where there are none."""
    if not targets_of(table):
        return ""
    return (
        "What is needed to a target is counted up to the first evaluated round that reaches it. A seed that did not "
        "reach it counts with at least what it had spent, and “n/m reached” says how many did; “> x” is the least that "
        "the median can be where too few did to know it."
    )


def paired_caption(table: pd.DataFrame) -> str:
    """Return the sentences that say how to read `paired_table`."""
    reference = reference_in(table)
    why = "" if reference == REFERENCE else f" ({REFERENCE} is not among the methods; this is the first one)"
    return (
        f"Each method against {reference}{why}, run by run with the same seed: the same split, initial weights and "
        "cohorts. Medians of the differences and ratios over seeds, lowest to highest in brackets, and in how many "
        "seeds the method is ahead (a better end, a smaller need). “> x”, “< x” and “x to y” before the brackets are "
        "bounds, where a seed did not reach the target; such a seed counts as ahead or behind only where the bound "
        "settles it. p: exact two-sided sign test over the seeds that differ, for information only: three seeds cannot "
        "bring it below 0.25, and it is not corrected for how many are shown."
    )
