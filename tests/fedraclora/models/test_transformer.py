import json
import logging
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from experiments.problem import prepare
from fedraclora.models import initial_model, transformer
from fedraclora.targets import find_dense, find_targets
from tests.helpers import federation, settings

VOCABULARY, WIDTH, PLACES, LENGTH = 32, 8, 16, 12
QUERIES_AND_VALUES = [f"backbone.layers.{i}.{part}" for i in (0, 1) for part in ("query", "value")]
TRAINED = {"targets": ["query", "value"], "dense": ["classifier.*"]}

# ---- an encoder in the place of the library's


class Layer(nn.Module):
    """Self-attention of one head, which drops by a function as the library's do."""

    def __init__(self, dropout):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = dropout

    def forward(self, states, mask):
        scores = self.query(states) @ self.key(states).transpose(1, 2) / WIDTH**0.5
        scores = scores.masked_fill(mask[:, None, :] == 0, float("-inf"))
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.norm(states + weights @ self.value(states))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.drop = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config.attention_probs_dropout_prob) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, input_ids, attention_mask):
        states = self.drop(self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])))
        for layer in self.layers:
            states = layer(states, attention_mask)
        return SimpleNamespace(last_hidden_state=states)


class EncoderSettings:
    def __init__(self):
        self.hidden_size, self.num_hidden_layers = WIDTH, 2
        self.hidden_dropout_prob, self.attention_probs_dropout_prob = 0.1, 0.25
        self.classifier_dropout, self.summary_first_dropout_layers = None, 3

    def to_dict(self):
        return dict(vars(self))


def load_encoder(source, *, config, output_loading_info):
    """Return the published weights, two of them without use, as the library does: with a warning."""
    assert output_loading_info
    torch.rand(100 * config.num_hidden_layers)  # the library may draw what it replaces afterwards
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        encoder = Encoder(config).half().eval()
    logging.getLogger("transformers.modeling_utils").warning("some weights were left out")
    return encoder, {"missing_keys": {"pooler.weight", "pooler.bias"}, "unexpected_keys": {"lm_head.bias"}}


@contextmanager
def stub_in_place():
    stub = SimpleNamespace(
        AutoConfig=SimpleNamespace(from_pretrained=lambda source: EncoderSettings()),
        AutoModel=SimpleNamespace(from_pretrained=load_encoder),
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda source, **options: Tokens()),
        # `datasets` looks for it in the library where it is loaded.
        PreTrainedTokenizerBase=type("PreTrainedTokenizerBase", (), {}),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", stub)
        yield stub


@pytest.fixture
def library():
    """Put the stub in the library's place."""
    with stub_in_place() as stub:
        yield stub


@pytest.fixture(scope="module")
def models():
    """A model of each pooling."""
    with stub_in_place():
        return {pooling: build(pooling=pooling).double() for pooling in transformer.POOLINGS}


def build(seed=0, num_outputs=3, input_shape=(2, LENGTH), **chosen):
    config = transformer.Config(**chosen)
    return initial_model(transformer, config, input_shape=input_shape, num_outputs=num_outputs, seed=seed)


def texts(lengths, seed=0, length=LENGTH):
    """Random token ids and their mask, as the data set gives them: float32."""
    drawn = torch.randint(1, VOCABULARY, (len(lengths), length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return torch.stack([drawn * mask, mask], 1).float()


def bits(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


# ---- the model


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_outputs_are_the_head_on_the_pooled_states(library, pooling):
    model, inputs = build(pooling=pooling).double(), texts([5, 12])
    states = model.backbone(input_ids=inputs[:, 0].long(), attention_mask=inputs[:, 1].long()).last_hidden_state
    pooled = torch.stack([states[0, :5].mean(0), states[1].mean(0)]) if pooling == "mean" else states[:, 0]
    expected = pooled @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(inputs.double()), expected, rtol=1e-12, atol=1e-12)
    assert model(inputs).shape == (2, 3)


@given(lengths=st.lists(st.integers(1, LENGTH), min_size=2, max_size=5), seed=st.integers(0, 99))
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_an_output_depends_on_its_own_text_and_not_on_padding(models, pooling, lengths, seed):
    model, inputs = models[pooling], texts(lengths, seed)
    outputs, own = model(inputs), inputs[0, :, : lengths[0]]
    torch.testing.assert_close(outputs[0], model(own[None])[0], rtol=1e-12, atol=1e-12)
    changed = inputs.clone()
    changed[:, 0] += 1 - changed[:, 1]  # another id in every place that is padding
    torch.testing.assert_close(outputs, model(changed), rtol=1e-12, atol=1e-12)


def test_the_encoder_sees_no_column_that_is_padding_in_every_row(library, monkeypatch):
    model, seen = build(), []
    model.backbone.register_forward_pre_hook(lambda _m, _a, given: seen.append(given["input_ids"]), with_kwargs=True)
    model(texts([3, 7, 2]))
    assert [tuple(ids.shape) for ids in seen] == [(3, 7)]
    assert seen[0].dtype == torch.int64


def test_the_weights_follow_from_the_name_and_the_seed(library):
    first, again, other = build(seed=2**63 - 1), build(seed=2**63 - 1), build(seed=1)
    assert bits(first) == bits(again)
    differing = {name for name, value in bits(first).items() if bits(other)[name] != value}
    assert differing == {"classifier.weight", "classifier.bias"}


def test_the_head_does_not_depend_on_what_the_library_draws(library):
    assert torch.equal(build(num_hidden_layers=1).classifier.weight, build(num_hidden_layers=2).classifier.weight)


def test_building_leaves_the_global_generator_as_it_was(library):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("wanted", "num"), [(0, 2), (1, 1), (2, 2)])
def test_as_many_layers_are_used_as_are_wanted(library, wanted, num):
    model = build(num_hidden_layers=wanted)
    assert len(model.backbone.layers) == num
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_nothing_is_dropped_in_training_mode_either(library):
    model, inputs = build().train(), texts([5, 9])
    assert torch.equal(model(inputs), model(inputs))


def test_the_pooler_is_left_out_and_the_embeddings_are_no_parameters(library):
    model = build()
    parts = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()}
    assert parts == {"query", "key", "value", "norm", "classifier"}
    assert {"backbone.words.weight", "backbone.places.weight"} <= set(model.state_dict())


def test_queries_values_and_the_head_are_what_a_run_can_train(library):
    model = build()
    assert list(find_targets(model, TRAINED["targets"])) == QUERIES_AND_VALUES
    assert find_dense(model, TRAINED["dense"], QUERIES_AND_VALUES) == ["classifier.weight", "classifier.bias"]


def test_the_library_warns_of_nothing_while_a_model_is_built_and_may_afterwards(library, caplog):
    build()
    assert not caplog.records
    logging.getLogger("transformers.modeling_utils").warning("later")
    assert [record.message for record in caplog.records] == ["later"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"input_shape": (1, 28, 28)}, r"found inputs of shape \[1, 28, 28\]: use dataset=glue"),
        ({"input_shape": (3, 12)}, r"shape \[3, 12\]"),
        ({"input_shape": (2,)}, r"shape \[2\]"),
        ({"pooling": "maen"}, r"model\.pooling='maen' is unknown; did you mean 'mean'\? valid: first, mean"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers=3: roberta-base has 2; give 1 to 2, or 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(library, chosen, message):
    with pytest.raises(ValueError, match=message):
        build(**chosen)


@pytest.mark.parametrize("inputs", [texts([3]) * torch.tensor([99.0, 1.0])[:, None], texts([20], length=20)])
def test_tokens_that_the_encoder_does_not_have_are_told_from_a_bug(library, inputs):
    with pytest.raises(ValueError, match=r"dataset\.tokenizer has to be that of model\.weights"):
        build()(inputs)


def test_weights_that_are_not_all_there_are_refused(library, monkeypatch):
    def load(source, **options):
        encoder, found = load_encoder(source, **options)
        return encoder, {**found, "missing_keys": ["pooler.bias", "words.weight", "layers.0.key.bias"]}

    monkeypatch.setattr(library.AutoModel, "from_pretrained", load)
    with pytest.raises(ValueError, match=r"roberta-base lack layers\.0\.key\.bias, words\.weight \(2 in all\)"):
        build()


@pytest.mark.parametrize("part", ["AutoConfig", "AutoModel"])
def test_an_encoder_that_cannot_be_had_is_answered_with_the_setting(library, monkeypatch, part):
    def fail(source, **options):
        raise OSError("no route")

    monkeypatch.setattr(getattr(library, part), "from_pretrained", fail)
    with pytest.raises(ConnectionError, match=r"'roberta-base' \(OSError: no route\).*model\.weights=FOLDER"):
        build()


def test_a_machine_without_transformers_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"encoder 'roberta-base'.*pip install \"fedraclora\[text\]\"") as caught:
        build()
    assert isinstance(caught.value.__cause__, ImportError)


def test_a_local_folder_goes_by_its_full_path(library, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(library.AutoConfig, "from_pretrained", lambda source: asked.append(source) or EncoderSettings())
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    build(weights="~/mine")
    assert asked == [str(tmp_path / "mine")]


# ---- federated


class Tokens(SimpleNamespace):
    """A tokenizer of words that are numbers."""

    def __call__(self, firsts, *, max_length, **options):
        rows = [[int(word) for word in text.split()] for text in firsts]
        parts = {"input_ids": [], "attention_mask": []}
        for row in rows:
            parts["input_ids"].append(row + [0] * (max_length - len(row)))
            parts["attention_mask"].append([1] * len(row) + [0] * (max_length - len(row)))
        return parts


def write_sentences(folder, num=24):
    """Sentences of numbers; the label is whether the first one is in the upper half."""
    inputs = texts([2 + i % (LENGTH - 2) for i in range(num)])
    rows = []
    for ids, mask in inputs.long().tolist():
        words = ids[: sum(mask)]
        rows.append([" ".join(map(str, words)), int(words[0] >= VOCABULARY // 2)])
    path = folder / "glue.json"
    path.write_text(json.dumps({"sst2": {"train": rows, "dev": rows[:6]}}))
    return str(path)


def run_settings(folder, **changes):
    tokens = {"task": "sst2", "path": write_sentences(folder), "max_length": LENGTH}
    values = {"dataset": ("glue", tokens), "model": "transformer", "partition": "iid", "num_clients": 3}
    return settings(**{**values, "fraction": 1.0, "rounds": 1, "lr": 0.1, "local_steps": 2, **TRAINED, **changes})


def moved_by_a_round(chosen):
    """Return the names of the tensors that a round of all clients moves."""
    parts = federation(chosen)
    before = {name: tensor.clone() for name, tensor in parts.chain.weights().items()}
    assert parts.run()[-1].num_ok == 3
    after = parts.chain.weights()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_a_federated_round_trains_queries_values_and_the_head(library, tmp_path):
    expected = {f"{layer}.weight" for layer in QUERIES_AND_VALUES} | {"classifier.weight", "classifier.bias"}
    assert moved_by_a_round(run_settings(tmp_path)) == expected


def test_all_but_the_embeddings_can_be_trained_in_full(library, tmp_path):
    chosen = run_settings(tmp_path, method="full", dense=[], targets="all")
    # A bias of the keys shifts the scores of a query alike, which changes nothing but the last bits.
    named = {name for name, _ in build().named_parameters() if not name.endswith("key.bias")}
    assert moved_by_a_round(chosen) - {f"backbone.layers.{i}.key.bias" for i in (0, 1)} == named


@pytest.mark.parametrize("rows", [1, 4])
def test_clients_together_end_where_each_ends_alone(library, tmp_path, rows):
    ends = [
        federation(run_settings(tmp_path, dtype="float64", batch_size=rows, exact=exact)) for exact in (False, True)
    ]
    for parts in ends:
        parts.run()
    together, alone = (parts.chain.weights() for parts in ends)
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-12, atol=1e-12)


# ---- the real library


@pytest.fixture(params=["bert", "roberta", "distilbert"])
def folder(request, tmp_path):
    """A tiny encoder with random weights, saved as a user's own would be."""
    transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
    kinds = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
        "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel),
    }
    make, kind = kinds[request.param]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if request.param == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    torch.manual_seed(0)
    kind(make(vocab_size=VOCABULARY, max_position_embeddings=2 * PLACES, **sizes)).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def chosen_model(folder):
    return ("transformer", {"weights": str(folder)})


def targets_of(folder):
    return ["q_lin", "v_lin"] if "distilbert" in (folder / "config.json").read_text() else ["query", "value"]


def test_a_real_encoder_is_the_one_in_the_folder(folder):
    import transformers

    model, inputs = build(weights=str(folder)), texts([5, 9])
    original = transformers.AutoModel.from_pretrained(folder)
    ids, mask = inputs.long().unbind(1)
    with torch.no_grad():
        states = original(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = model.classifier(torch.stack([states[0, :5].mean(0), states[1, :9].mean(0)]))
        torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
    assert len(find_targets(build(weights=str(folder), num_hidden_layers=1), targets_of(folder))) == 2


def test_a_real_encoder_keeps_texts_apart_and_drops_nothing(folder):
    model, inputs = build(weights=str(folder)).double().train(), texts([5, 9, 1])
    outputs = model(inputs)
    for row, length in enumerate([5, 9, 1]):
        torch.testing.assert_close(outputs[row], model(inputs[row : row + 1, :, :length])[0], rtol=1e-10, atol=1e-10)


def test_a_real_encoder_passes_the_probe_and_trains_federated(folder, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_a, **_k: Tokens()))
    chosen = run_settings(tmp_path, model=chosen_model(folder), targets=targets_of(folder))
    names = {f"{name}.weight" for name in find_targets(prepare(chosen).model, targets_of(folder))}
    assert moved_by_a_round(chosen) == names | {"classifier.weight", "classifier.bias"}
    in_full = run_settings(tmp_path, method="full", model=chosen_model(folder), targets="all", dense=[])
    assert moved_by_a_round(in_full) >= names


def test_real_weights_that_are_not_all_there_are_refused(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    dropped = next(name for name in weights if "embeddings" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != dropped}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack .*embeddings"):
        build(weights=str(folder))


def test_a_folder_without_an_encoder_is_named(tmp_path):
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    with pytest.raises(ConnectionError, match=r"cannot load the encoder .*model\.weights=FOLDER"):
        build(weights=str(tmp_path))
