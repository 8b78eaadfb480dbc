"""A pre-trained encoder from the `transformers` library with a linear head: BERT, RoBERTa and their relatives.

Inputs are those of dataset=glue: `[num, 2, length]`, token ids and attention mask. The head is the layer `classifier`,
drawn from the seed; everything else is as published. It is meant for `targets=[query,value]`, low-rank factors on the
attention's queries and values (E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv
2106.09685), and `dense=["classifier.*"]`, the head trained in full.

Left out: dropout; training of the embeddings, which have no cohort form, so that even methods that train all weights
leave them as they are; segment ids; the encoder's own pooler.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fedraclora.plugins import nearest

POOLINGS = ("mean", "first")


@dataclass
class Config:
    """Settings of the transformer.

    weights: the encoder's name on the Hugging Face hub, or a local folder with its `config.json` and weights, which
        must then be there under the same path on every machine.
    num_hidden_layers: so many of the first layers are used; 0: all.
    pooling: what the head sees of a text: the `mean` of its tokens' last hidden states, or the state of the `first`
        token (`<s>` or `[CLS]`).
    """

    weights: str = "roberta-base"
    num_hidden_layers: int = 0
    pooling: str = "mean"


class TextClassifier(nn.Module):
    """An encoder and a linear head on what its last hidden states are pooled to."""

    def __init__(self, backbone: nn.Module, classifier: nn.Linear, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.pooling = pooling

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs `[num, num_outputs]` of `inputs` `[num, 2, length]`, whole numbers of any type.

        Raises ValueError for token ids that the encoder does not have.
        """
        # Most texts are far shorter than the longest: columns that are padding in every row change nothing.
        length = max(1, int(inputs[:, 1].sum(1).max()))
        ids, mask = inputs[:, :, :length].long().unbind(1)
        try:
            states: Tensor = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        except IndexError as error:
            raise ValueError(
                f"the encoder has no embedding for a token id (the largest is {int(ids.max())}) or for a place (the "
                f"longest text has {length} tokens): dataset.tokenizer has to be that of model.weights, and "
                f"dataset.max_length within its limit ({error})"
            ) from error
        outputs: Tensor = self.classifier(states[:, 0] if self.pooling == "first" else _mean(states, mask))
        return outputs


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def build(config: Config, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the encoder with its published weights and a head drawn from PyTorch's global generator.

    Raises ValueError for inputs that are no tokens, settings that cannot be used, weights that are not all there, and
    where `transformers` is not installed; ConnectionError where they cannot be loaded.
    """
    if len(input_shape) != 2 or input_shape[0] != 2:
        raise ValueError(
            f"model=transformer takes token ids and attention mask [2, length]; found inputs of shape "
            f"{list(input_shape)}: use dataset=glue"
        )
    if config.pooling not in POOLINGS:
        raise ValueError(f"model.pooling={config.pooling!r} is unknown; {nearest(config.pooling, POOLINGS)}")
    transformers = import_transformers(f"model=transformer needs the encoder {config.weights!r}")
    folder = Path(config.weights).expanduser()
    source = str(folder) if folder.is_dir() else config.weights
    settings = _encoder_settings(transformers, source, config)
    # Before the encoder is loaded: what that draws, if anything, differs between versions of the library.
    classifier = nn.Linear(settings.hidden_size, num_outputs)
    return TextClassifier(_load_encoder(transformers, source, settings), classifier, config.pooling)


def import_transformers(purpose: str) -> ModuleType:
    """Return the `transformers` library. Raises ValueError where it is not installed; `purpose` says who needs it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f'{purpose}, and `transformers` cannot be imported ({error}); pip install "fedraclora[text]"'
        ) from error


def _encoder_settings(transformers: ModuleType, source: str, config: Config) -> Any:  # noqa: ANN401
    """Return the encoder's own settings, without dropout and with as many layers as are wanted."""
    settings = _loaded(source, lambda: transformers.AutoConfig.from_pretrained(source))
    num_layers = settings.num_hidden_layers
    if not 0 <= config.num_hidden_layers <= num_layers:
        raise ValueError(
            f"model.num_hidden_layers={config.num_hidden_layers}: {source} has {num_layers}; give 1 to {num_layers}, "
            "or 0 for all"
        )
    settings.num_hidden_layers = config.num_hidden_layers or num_layers
    # The attention drops by a function, whose masks would depend on which clients train together.
    for key, value in settings.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(settings, key, 0.0)
    return settings


def _load_encoder(transformers: ModuleType, source: str, settings: Any) -> nn.Module:  # noqa: ANN401
    """Return the encoder in float32, without a pooler and with its embeddings frozen.

    Raises ValueError where a weight is missing: the library would draw it, and only say so.
    """
    load = transformers.AutoModel.from_pretrained
    with _quiet():  # what it has to say is looked at here
        encoder, found = _loaded(source, lambda: load(source, config=settings, output_loading_info=True))
    encoder.pooler = None
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"the weights of {source} lack {', '.join(missing[:8])} ({len(missing)} in all)")
    encoder = encoder.to(torch.float32)
    for module in list(encoder.modules()):
        if isinstance(module, nn.Embedding):
            _freeze_(module)
    return encoder  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the library warn of nothing; layers that are left out would fill a screen each time."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _freeze_(embedding: nn.Embedding) -> None:
    """Make the table a buffer: part of the model's state, and none of its parameters."""
    table = embedding.weight.detach()
    del embedding.weight
    embedding.register_buffer("weight", table)


def _loaded(source: str, load: Callable[[], Any]) -> Any:  # noqa: ANN401
    """Return what `load` gives. Raises ConnectionError where it fails."""
    try:
        return load()
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        raise ConnectionError(
            f"cannot load the encoder {source!r} ({type(error).__name__}: {error}); without a network give "
            "model.weights=FOLDER with its config.json and weights"
        ) from error
