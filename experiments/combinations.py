"""Which settings go together: refused before any training starts, with the reason and what would be right."""

from collections.abc import Iterator
from math import inf

from experiments.devices import NO_DEVICES, load_devices
from experiments.settings import Settings
from fedraclora.codec import codec_of
from strategies.method import Method
from strategies.rounds import RoundSettings


def check_combination(settings: Settings, method: Method, rounds: RoundSettings) -> None:
    """Raise ValueError for settings that the method, or one another, do not go with."""
    for reason in (
        *_of_method(settings, method, rounds),
        *_of_sending(settings, rounds),
        *_of_privacy(settings),
        *_of_time(settings),
    ):
        raise ValueError(reason)


def _of_method(settings: Settings, method: Method, rounds: RoundSettings) -> Iterator[str]:
    name, traits = settings.method.name, method.traits
    if not settings.sketch.shared and not traits.has_private_draws:
        yield f"sketch.shared=false: method {name} needs factors that all clients share; rac_lora can do without"
    if rounds.ranks and not traits.has_ranks:
        yield f"client_ranks: in method {name} all clients have one rank; set ranks by layer with ranks={{layer: rank}}"
    if not rounds.robust.is_plain and not traits.is_mean:
        yield f"robust.*: method {name} is no mean of what clients send, so nothing can take the mean's place"
    if settings.privacy.level == "client" and not traits.is_mean:
        yield f"privacy.level=client: method {name} is no mean of what clients send, and noise is added to a mean"
    if not traits.is_global and not settings.personal_fraction:
        yield f"method {name} has no model for all; set personal_fraction=0.1, say, to score the clients' own"
    if rounds.sending.variates and not traits.is_steady:
        yield (
            f"scaffold=true: in method {name}, as it is set, clients do not train and send the same tensors in every "
            "round, so that control variates mean nothing"
        )
    if rounds.downlink and codec_of(rounds.downlink).is_sparse and not method.closes(1):
        yield (
            f"downlink={settings.downlink.name} keeps few of the numbers, which is right for differences only; method "
            f"{name} sends the values of a link that stays open"
        )


def _of_sending(settings: Settings, rounds: RoundSettings) -> Iterator[str]:
    sending = rounds.sending
    if sending.feedback != "none" and not sending.codec:
        yield f"memory.feedback={sending.feedback} goes with a compressor; name one with uplink=..."
    if sending.variates and (settings.optimizer != "sgd" or settings.momentum or settings.weight_decay):
        yield "scaffold=true needs plain SGD (optimizer=sgd momentum=0 weight_decay=0): its variates are mean gradients"
    if sending.variates and (rounds.ranks or settings.privacy.level != "none" or not rounds.robust.is_plain):
        yield "scaffold=true goes with clients of one rank, without privacy.* and robust.*"
    if rounds.ranks and sending.feedback in ("ef21", "marina") and settings.alpha is not None:
        yield f"memory.feedback={sending.feedback} with client_ranks needs one scale for all: leave alpha out"
    if rounds.cohort_size < rounds.robust.fewest:
        yield (
            f"robust.aggregate={rounds.robust.aggregate} with these settings needs {rounds.robust.fewest} replies; a "
            f"cohort has {rounds.cohort_size}"
        )


def _of_privacy(settings: Settings) -> Iterator[str]:
    level = settings.privacy.level
    if level == "none":
        return
    if settings.robust.aggregate != "mean" or settings.robust.max_norm:
        yield "privacy.* and robust.* do not go together: the accountant counts on the noisy mean of clipped updates"
    if settings.memory.feedback != "none" or settings.scaffold:
        yield "privacy.* goes without memory.feedback and scaffold: what clients remember would have to be counted too"
    if settings.personal_fraction:
        yield "privacy.* goes without personal_fraction: the clients' scores are not private"
    if level == "client" and settings.client_ranks is not None and settings.alpha is not None:
        yield "privacy.level=client with client_ranks needs one scale for all clients: leave alpha out"


def _of_time(settings: Settings) -> Iterator[str]:
    if settings.devices == NO_DEVICES:
        if settings.deadline_s:
            yield f"deadline_s={settings.deadline_s} is simulated time: name devices, too; the real limit is timeout_s"
        return
    if settings.runtime.name != "in_process":
        yield (
            f"devices={settings.devices} goes with runtime=in_process alone: in runtime={settings.runtime.name} time "
            "passes and is not simulated"
        )
    if not 0 <= settings.deadline_s < inf:
        yield f"deadline_s={settings.deadline_s} must be finite, and at least 0 (no deadline)"
    # Raises ValueError itself.
    load_devices(settings.devices, settings.num_clients, settings.seed)
