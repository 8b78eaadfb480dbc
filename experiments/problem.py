"""From settings to the things that a run is made of, all checked before any training starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from clients.replica import LocalData, Memory, Replica
from clients.state_store import ClientStore
from experiments.combinations import check_combination
from experiments.groups import GROUPS, plain_values
from experiments.settings import Settings
from fedraclora.chain import Chain
from fedraclora.codec import codec_text
from fedraclora.data import Dataset, Split, check_dataset
from fedraclora.finished import ModelCard, read_weights, take_weights_
from fedraclora.ledger import MIB
from fedraclora.local_config import LocalConfig
from fedraclora.plan import FEEDBACKS, MEMORIES, RoundPlan, Sending
from fedraclora.plugins import find, nearest
from fedraclora.privacy import LEVELS, Privacy
from fedraclora.probe import check_clients_stay_apart
from fedraclora.seeding import derive_seed, generator, stream
from fedraclora.server_rule import RULES, ServerRule
from fedraclora.setup import Plugin, Setup, base_weights, build_dataset, hold_out, hold_out_own, split_dataset
from fedraclora.sketch import LAWS
from fedraclora.targets import find_dense, find_targets
from fedraclora.travel import kept_of
from strategies.asking import link_of_rank
from strategies.merging import AGGREGATES, Robust
from strategies.method import Adapter, Method
from strategies.rounds import RoundSettings
from strategies.state import Budget

DTYPES = ("float32", "float64")
SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Problem:
    """The data, the initial model, the method and the rules of its rounds."""

    dataset: Dataset
    split: Split
    model: nn.Module
    method: Method
    rounds: RoundSettings
    setup: Setup

    @property
    def card(self) -> ModelCard:
        """Return what it takes to build the model again."""
        return self.setup.model

    def new_chain(self) -> Chain:
        """Return the chain without links over the initial weights; chains live on the CPU, models on their device."""
        return Chain.start(base_weights(self.model))

    def replica(self, chain: Chain, store: ClientStore) -> Replica:
        """Return the replica that all simulated clients share.

        `chain` is its own copy of the log; who has taken part holds the factors of the open link, too.
        """
        rows, held_out = hold_out_own(self.dataset.train, dict(enumerate(self.split.indices)), self.setup)
        data = LocalData(self.dataset.train, rows, self.dataset.task, held_out)
        memory = Memory(self.setup.chunk_bytes, self.setup.chunk_clients)
        replica = Replica(self.model, data, chain, store, memory)
        if chain.open is not None:
            views = [link_of_rank(chain.open, rank, self.rounds.alpha) for rank in {0, *self.rounds.ranks}]
            replica.kept = {key: tensor for view in views for key, tensor in kept_of(view).items()}
            replica.open_version = chain.version
        return replica


def prepare(settings: Settings) -> Problem:
    """Return the problem that the settings describe. Raises ValueError for anything that cannot be run."""
    check_choices(settings)
    _check_machine(settings)
    dataset = load_dataset(settings)
    setup = make_setup(settings, dataset)
    split = split_dataset(setup.partition, dataset, num_clients=settings.num_clients)
    model = setup.initial_model()
    check_no_tied_weights(model)
    if settings.start_from is not None:
        take_weights_(model, read_weights(settings.start_from), f"start_from={settings.start_from}")
    setup = replace(setup, base=Chain.start(base_weights(model)).hash)
    method: Method = find(GROUPS["method"], settings.method.name).build(settings.method, make_adapter(settings, model))
    rounds = round_settings(settings)
    check_combination(settings, method, rounds)
    problem = Problem(_on_device(dataset, settings), split, model, method, rounds, setup)
    _probe(problem)
    return problem


def make_setup(settings: Settings, dataset: Dataset) -> Setup:
    """Return what a client's machine is told of the run, but for the digest of the base."""
    model = ModelCard(
        name=settings.model.name,
        config=_own_settings(settings.model),
        input_shape=dataset.input_shape,
        num_outputs=dataset.num_outputs,
        dtype=settings.dtype,
    )
    partition_seed = stream(settings.seed, "partition")
    return Setup(
        base="",
        model=model,
        model_seed=stream(settings.seed, "init"),
        task=dataset.task,
        dataset=_dataset_plugin(settings),
        validation=_validation(settings),
        partition=Plugin(settings.partition.name, _own_settings(settings.partition), partition_seed),
        num_clients=settings.num_clients,
        device=settings.device,
        threads=1 if settings.exact else settings.threads,
        chunk_bytes=int(settings.chunk_mib * MIB),
        chunk_clients=1 if settings.exact else 0,
        personal=settings.personal_fraction,
        personal_seed=derive_seed(partition_seed, "personal"),
    )


def _own_settings(config: Any) -> dict[str, Any]:  # noqa: ANN401
    return {key: value for key, value in plain_values(config).items() if key != "name"}


def _dataset_plugin(settings: Settings) -> Plugin:
    seed = derive_seed(stream(settings.seed, "init"), "dataset")
    return Plugin(settings.dataset.name, _own_settings(settings.dataset), seed)


def _validation(settings: Settings) -> float:
    return settings.validation_fraction if settings.eval_split == "validation" else 0.0


def _probe(problem: Problem) -> None:
    """Prepare the first round's training as a client would, and look at the model once before anything is trained."""
    chain = problem.new_chain()
    link = problem.method.open_link(0, chain.merged)
    # One client's draws serve for all here.
    chain.open_link(link.of_client(0))
    plan = RoundPlan(round=1, training=problem.method.trains(1, link))
    trainer, start = problem.replica(chain, ClientStore()).prepare(plan)
    dataset = problem.dataset
    check_clients_stay_apart(trainer.model, start, (dataset.train if len(dataset.train) else dataset.test).inputs)


def check_no_tied_weights(model: nn.Module) -> None:
    """Raise ValueError where two names share one tensor: the chain would change one of them and not the other."""
    owners: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in owners:
            raise ValueError(
                f"{owners[tensor.data_ptr()]!r} and {name!r} are one tensor; tied weights are not supported: untie them"
            )
        owners[tensor.data_ptr()] = name


def _is_elsewhere(settings: Settings) -> bool:
    """Return whether the clients bring their own data."""
    return bool(getattr(find(GROUPS["partition"], settings.partition.name), "IS_ELSEWHERE", False))


def load_dataset(settings: Settings) -> Dataset:
    """Return the data set; with `eval_split=validation` its test set is held out from the training examples."""
    plugin = _dataset_plugin(settings)
    dataset = build_dataset(plugin)
    check_dataset(dataset, has_train=not _is_elsewhere(settings))
    return hold_out(dataset, plugin, validation=_validation(settings))


def _on_device(dataset: Dataset, settings: Settings) -> Dataset:
    where = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}
    return replace(dataset, train=dataset.train.to(**where), test=dataset.test.to(**where))


def make_adapter(settings: Settings, model: nn.Module) -> Adapter:
    """Return what a method sees of the model. Raises ValueError for targets, ranks or an alpha that it cannot have."""
    shapes = find_targets(model, settings.targets)
    for layer in settings.ranks:
        if layer not in shapes:
            raise ValueError(f"ranks names layer {layer!r}, which is no target; {nearest(layer, shapes)}")
    ranks = {layer: settings.ranks.get(layer, settings.rank) for layer in shapes}
    wrong = [f"{layer}: {rank}" for layer, rank in ranks.items() if rank < 1]
    if wrong or (settings.alpha is not None and not settings.alpha > 0):
        raise ValueError(f"ranks must be at least 1 and alpha positive; found {wrong or settings.alpha}")
    scales = {layer: 1.0 if settings.alpha is None else settings.alpha / rank for layer, rank in ranks.items()}
    return Adapter(
        shapes=shapes,
        ranks=ranks,
        scales=scales,
        dense=tuple(find_dense(model, settings.dense, list(shapes))),
        parameters=tuple(name for name, _ in model.named_parameters()),
        law=settings.sketch.law,
        seed=stream(settings.seed, "sketch"),
        is_shared=settings.sketch.shared,
    )


def round_settings(settings: Settings) -> RoundSettings:
    """Return the rules of the rounds. Raises ValueError for values with which no round can be run."""
    return RoundSettings(
        num_clients=settings.num_clients,
        fraction=settings.fraction,
        local=LocalConfig(
            optimizer=settings.optimizer,
            lr=settings.method.lr if settings.lr is None else settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            steps=0 if settings.local_epochs else settings.local_steps,
            epochs=settings.local_epochs,
            batch_size=settings.batch_size,
            proximal=settings.proximal,
            clip_norm=settings.clip_norm,
        ),
        seed=settings.seed,
        min_replies=settings.min_replies,
        weighting=settings.weighting,
        catch_up=settings.catch_up,
        broadcast=settings.broadcast,
        max_norm=settings.max_norm,
        timeout_s=settings.timeout_s,
        connect_s=settings.connect_s,
        budget=Budget(
            *(_bytes(limit) for limit in (settings.budget_mib, settings.uplink_mib, settings.per_client_mib))
        ),
        sending=_sending(settings),
        downlink=codec_text(settings.downlink.name, _own_settings(settings.downlink)),
        whole_probability=settings.memory.whole_probability,
        rule=ServerRule(*plain_values(settings.server).values()),
        robust=Robust(**plain_values(settings.robust)),
        privacy=None if settings.privacy.level == "none" else Privacy(**plain_values(settings.privacy)),
        is_deployed=getattr(settings.runtime, "superlink", None) is not None,
        ranks=client_ranks(settings),
        lr_scales=tuple(settings.client_lr_scales),
        alpha=settings.alpha,
        verify=settings.verify,
    )


def _sending(settings: Settings) -> Sending:
    return Sending(
        codec=codec_text(settings.uplink.name, _own_settings(settings.uplink)),
        feedback=settings.memory.feedback,
        memory=settings.memory.at_new_link,
        variates=settings.scaffold,
    )


def client_ranks(settings: Settings) -> tuple[int, ...]:
    """Return the rank of each client, empty where all have the layers' own.

    Shares by rank are dealt out in a random order of the clients; the largest rank takes what rounding leaves. Raises
    ValueError for anything that gives no rank to some client.
    """
    wanted = settings.client_ranks
    if wanted is None:
        return ()
    if not isinstance(wanted, Mapping | Sequence) or isinstance(wanted, str):
        raise ValueError(
            f"client_ranks={wanted!r} must be a list, a rank a client, or shares of the clients by rank, "
            "{4: 0.5, 8: 0.5}; one rank for all is rank=8"
        )
    strange = [rank for rank in wanted if not str(rank).isdigit()]
    if strange:
        raise ValueError(f"client_ranks names {strange}, which are no ranks; they are whole numbers, at least 1")
    if not isinstance(wanted, Mapping):
        ranks = tuple(int(rank) for rank in wanted)
        if len(ranks) != settings.num_clients or min(ranks) < 1:
            raise ValueError(
                f"client_ranks={list(ranks)} must hold a rank, at least 1, for each of {settings.num_clients} clients"
            )
        return ranks
    shares = {int(rank): float(share) for rank, share in sorted(wanted.items(), key=lambda item: int(item[0]))}
    if min(shares) < 1 or abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) < 0:
        raise ValueError(f"client_ranks={shares}: ranks must be at least 1, and their shares add up to 1")
    counts = {rank: round(share * settings.num_clients) for rank, share in shares.items()}
    dealt = [rank for rank, count in counts.items() for _ in range(count)][: settings.num_clients]
    dealt += [max(shares)] * (settings.num_clients - len(dealt))
    order = generator(derive_seed(stream(settings.seed, "cohort"), "ranks")).permutation(settings.num_clients)
    return tuple(dealt[place] for place in order)


def _bytes(mib: float | None) -> float | None:
    return None if mib is None else mib * MIB


def check_choices(settings: Settings) -> None:
    """Raise ValueError for a value that is none of those that a setting can have, whatever the machine."""
    choices = (
        ("dtype", settings.dtype, DTYPES),
        ("eval_split", settings.eval_split, SPLITS),
        ("keep_versions", settings.keep_versions, ("all", "last")),
        ("sketch.law", settings.sketch.law, LAWS),
        ("privacy.level", settings.privacy.level, ("none", *LEVELS)),
        ("memory.feedback", settings.memory.feedback, FEEDBACKS),
        ("memory.at_new_link", settings.memory.at_new_link, MEMORIES),
        ("server.rule", settings.server.rule, RULES),
        ("robust.aggregate", settings.robust.aggregate, AGGREGATES),
    )
    for key, value, valid in choices:
        if value not in valid:
            raise ValueError(f"{key}={value!r} is unknown; {nearest(value, valid)}")
    for key, least in (("rounds", 0), ("eval_every", 1), ("threads", 0), ("snapshot_every", 0)):
        if getattr(settings, key) < least:
            raise ValueError(f"{key}={getattr(settings, key)} must be at least {least}")
    for key in ("chunk_mib", "budget_mib", "uplink_mib", "per_client_mib"):
        value = getattr(settings, key)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{key}={value} must be positive and finite")
    if not 0 <= settings.personal_fraction < 1:
        raise ValueError(f"personal_fraction={settings.personal_fraction} must lie in [0, 1)")


def _check_machine(settings: Settings) -> None:
    if _is_elsewhere(settings) and getattr(settings.runtime, "superlink", None) is None:
        raise ValueError(
            f"with partition={settings.partition.name} the clients' data are on their own machines; that needs "
            "runtime=deployment and runtime.superlink=HOST:PORT"
        )
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device={settings.device!r} is not available here; use device=cpu")
