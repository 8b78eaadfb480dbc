import json
import lzma
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.data import check_dataset
from fedraclora.datasets import glue
from fedraclora.datasets._glue_files import TASKS, as_rows, read_bundle
from tests.helpers import shared_data

PAIRS = ["mrpc", "rte", "stsb"]
SINGLES = ["cola", "sst2"]
CLASSES = ["mrpc", "cola", "rte", "sst2"]
LENGTH = 10


def made_up_rows(task, num):
    """Rows of a task: the texts of row i have i + 1 words, the second ones one word."""
    labels = [1.25 * (i % 5) if task == "stsb" else i % 2 for i in range(num)]
    first = [" ".join("abc"[i % 3] * (i + 1)) for i in range(num)]
    return [[text, *(["zz"] if task in PAIRS else []), label] for text, label in zip(first, labels, strict=True)]


def made_up_bundle():
    return {task: {"train": made_up_rows(task, 6), "dev": made_up_rows(task, 3)} for task in TASKS}


def write_bundle(path, bundle):
    content = json.dumps(bundle).encode()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return str(path)


def tokens(text):
    return [*(10 + len(word) for word in text.split()), 2]


class WordTokenizer:
    """A token a word, which is ten more than its length; 1 begins a text, 2 ends each part, 5 is padding."""

    def __call__(self, *texts, padding, truncation, max_length, return_attention_mask):
        assert (padding, truncation, return_attention_mask) == ("max_length", True, True)
        rows = [
            [1, *(token for text in row for token in tokens(text))][:max_length] for row in zip(*texts, strict=True)
        ]
        return {
            "input_ids": [row + [5] * (max_length - len(row)) for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (max_length - len(row)) for row in rows],
        }


@pytest.fixture
def asked(monkeypatch):
    """Put a tokenizer of our own in the library's place; the list is what it was asked for."""
    calls = []

    def from_pretrained(source, **options):
        calls.append((source, options))
        return WordTokenizer()

    # The second is what `datasets` looks for in the library where it is loaded.
    stub = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=from_pretrained),
        PreTrainedTokenizerBase=type("PreTrainedTokenizerBase", (), {}),
    )
    monkeypatch.setitem(sys.modules, "transformers", stub)
    return calls


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "glue.json", made_up_bundle())


def load(task, path, seed=0, **settings):
    return glue.build(glue.Config(task=task, path=str(path), **{"max_length": LENGTH, **settings}), seed=seed)


def same(first, second):
    pairs = [(first.train, second.train), (first.test, second.test)]
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in pairs)


@pytest.fixture(scope="module")
def shared_file():
    return shared_data("glue5.json.xz")


# ---- the data set


@pytest.mark.parametrize("task", TASKS)
def test_each_task_keeps_the_contract_of_data_sets(asked, bundle, task):
    dataset = load(task, bundle)
    check_dataset(dataset)
    assert dataset.name == "glue"
    assert dataset.input_shape == (2, LENGTH)
    assert (len(dataset.train), len(dataset.test)) == (6, 3)
    for examples in (dataset.train, dataset.test):
        assert examples.inputs.dtype == torch.float32
        assert torch.equal(examples.inputs, examples.inputs.round())
    assert same(dataset, load(task, bundle, seed=1))


@pytest.mark.parametrize("task", CLASSES)
def test_four_tasks_have_two_classes_that_are_the_labels(asked, bundle, task):
    dataset = load(task, bundle)
    assert (dataset.task, dataset.num_outputs) == ("classification", 2)
    assert dataset.train.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset.train.targets.dtype == torch.int64


def test_stsb_is_a_regression_of_the_score(asked, bundle):
    dataset = load("stsb", bundle)
    assert (dataset.task, dataset.num_outputs) == ("regression", 1)
    assert dataset.train.targets.tolist() == [[0.0], [1.25], [2.5], [3.75], [5.0], [0.0]]
    assert dataset.train.targets.dtype == torch.float32


def test_pairs_are_tokenised_together_and_padded_behind(asked, bundle):
    inputs = load("rte", bundle).test.inputs
    assert inputs[1].tolist() == [
        [1, 11, 11, 2, 12, 2, 5, 5, 5, 5],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    ]


def test_single_sentences_are_tokenised_alone_and_cut(asked, bundle):
    inputs = load("cola", bundle, max_length=8).train.inputs
    assert inputs[1].tolist() == [[1, 11, 11, 2, 5, 5, 5, 5], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert inputs[5].tolist() == [[1, 11, 11, 11, 11, 11, 11, 2], [1] * 8]
    assert load("sst2", bundle, max_length=8).train.inputs[5, 0, 7] == 2


def test_token_ids_survive_the_type_of_the_model(asked, bundle):
    examples = load("mrpc", bundle).train
    for dtype in (torch.float32, torch.float64):
        moved = examples.to(device="cpu", dtype=dtype)
        assert moved.inputs.dtype == dtype
        assert torch.equal(moved.inputs.long(), examples.inputs.long())
        assert moved.targets.dtype == torch.int64


def test_the_tokenizer_comes_by_name_or_from_a_folder_and_pads_on_the_right(asked, bundle, tmp_path, monkeypatch):
    load("mrpc", bundle)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "words").mkdir()
    load("mrpc", bundle, tokenizer="~/words")
    options = {"padding_side": "right"}
    assert asked == [("roberta-base", options), (str(tmp_path / "words"), options)]


# ---- the bundle

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, st.integers(0, 1)), min_size=1, max_size=8),
    scores=st.lists(st.tuples(TEXTS, TEXTS, st.floats(0, 5)), min_size=1, max_size=8),
    suffix=st.sampled_from([".json", ".json.xz"]),
    dev=st.sampled_from(["dev", "validation"]),
)
def test_a_bundle_is_read_as_it_was_written(tmp_path_factory, rows, scores, suffix, dev):
    path = tmp_path_factory.mktemp("glue") / f"bundle{suffix}"
    tasks = {"rte": {"train": rows, dev: rows[:1], "test": [["no label"]]}, "stsb": {"train": scores, dev: scores[-1:]}}
    write_bundle(path, tasks)
    for name, expected in (("rte", rows), ("stsb", scores)):
        train, test = read_bundle(path, name)
        assert list(zip(*train.texts, train.labels, strict=True)) == expected
        assert list(zip(*test.texts, test.labels, strict=True)) == [tuple(row) for row in tasks[name][dev]]


def test_compressed_and_plain_bundles_give_the_same_data(asked, bundle, tmp_path):
    packed = write_bundle(tmp_path / "glue.json.xz", made_up_bundle())
    assert same(load("mrpc", packed), load("mrpc", bundle))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("mrpc", ["one", 1], r"row 1 of mrpc/train in .*bundle\.json has to be \[text, text, label\].*0 to 1"),
        ("cola", ["one", "two", 1], r"has to be \[text, label\]"),
        ("rte", ["one", "two", 2], "0 to 1; found .*2"),
        ("rte", ["one", "two", -1], "0 to 1; found .*-1"),
        ("rte", ["one", "two", True], "found .*True"),
        ("rte", ["one", "two", 1.0], r"found .*1\.0"),
        ("rte", ["one", None, 1], "found .*None"),
        ("rte", "ab1", "found 'ab1'"),
        ("rte", 7, "found 7"),
        ("stsb", ["one", "two", 5.1], "a score from 0 to 5; found"),
        ("stsb", ["one", "two", float("nan")], "found .*nan"),
        ("stsb", ["one", "two", "3"], "found .*'3'"),
        ("stsb", ["one" * 100, "two", None], r"found \['oneone.*\.\.\.$"),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, task, row, message):
    good = made_up_rows(task, 3)
    path = tmp_path / "bundle.json"
    write_bundle(path, {task: {"train": [good[0], row, good[1]], "dev": good}})
    with pytest.raises(ValueError, match=message):
        read_bundle(path, task)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mrpcc": {}}, r"holds no task 'mrpc'; did you mean 'mrpcc'\? valid: mrpcc"),
        ({"mrpc": [1]}, "holds no task 'mrpc'"),
        ([], "holds no task 'mrpc'; valid: none"),
        ({"mrpc": {"dev": []}}, r"mrpc lacks the split train; found \['dev'\]"),
        ({"mrpc": {"train": [], "test": []}}, r"lacks the split dev; found \['test', 'train'\]"),
        ({"mrpc": {}}, "lacks the split train and dev"),
        ({"mrpc": {"train": [], "dev": []}}, r"mrpc/train in .* at least one; found \[\]"),
        ({"mrpc": {"train": "rows", "dev": []}}, "a list of rows, at least one; found 'rows'"),
        ({"mrpc": {"train": 3, "dev": []}}, "found 3"),
    ],
)
def test_a_bundle_of_another_form_is_refused(tmp_path, content, message):
    path = tmp_path / "bundle.json"
    write_bundle(path, content)
    with pytest.raises(ValueError, match=message):
        read_bundle(path, "mrpc")


@pytest.mark.parametrize("name", ["bundle.json", "bundle.json.xz"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xfa", lzma.compress(b"{}")[:-9], lzma.compress(b"[")])
def test_a_damaged_bundle_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not a readable {path.suffix} file"):
        read_bundle(path, "mrpc")


def test_a_missing_bundle_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset\.path=.*nowhere\.json does not exist; give"):
        read_bundle(tmp_path / "nowhere.json", "mrpc")


# ---- settings, the library and the hub


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "mprc"}, r"dataset\.task='mprc' is unknown; did you mean 'mrpc'\? valid: cola, mrpc"),
        ({"max_length": 7}, r"dataset\.max_length=7 must be at least 8"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_anything_is_read(settings, message):
    with pytest.raises(ValueError, match=message):
        glue.build(glue.Config(path="nowhere.json", **settings), seed=0)


def test_a_machine_without_transformers_is_told_what_to_install(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"tokenizer 'roberta-base'.*pip install \"fedraclora\[text\]\"") as caught:
        load("mrpc", bundle)
    assert isinstance(caught.value.__cause__, ImportError)


def test_a_tokenizer_that_cannot_be_had_is_answered_with_the_setting(asked, bundle, monkeypatch):
    def fail(source, **options):
        raise OSError("no route")

    monkeypatch.setattr(sys.modules["transformers"].AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ConnectionError, match=r"'roberta-base' \(OSError: no route\).*dataset\.tokenizer=FOLDER"):
        load("mrpc", bundle)


@pytest.mark.parametrize("task", TASKS)
def test_hub_and_bundle_give_the_same_data(asked, bundle, monkeypatch, task):
    import datasets

    def split(rows):
        columns = dict(zip([*TASKS[task].columns, "label"], zip(*rows, strict=True), strict=True))
        return datasets.Dataset.from_dict({**columns, "idx": range(len(rows))})

    splits = datasets.DatasetDict(
        train=split(made_up_rows(task, 6)),
        validation=split(made_up_rows(task, 3)),
        test=split([[*row[:-1], -1] for row in made_up_rows(task, 2)]),
    )
    named = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: named.append(name) or splits)
    from_hub = glue.build(glue.Config(task=task, max_length=LENGTH), seed=0)
    assert same(from_hub, load(task, bundle))
    assert named == [("nyu-mll/glue", task)]


def test_unreachable_hub_is_answered_with_dataset_path(asked, monkeypatch):
    import datasets

    def fail(*name):
        raise OSError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"'mrpc' of 'nyu-mll/glue'.*OSError: no route.*dataset\.path="):
        glue.build(glue.Config(), seed=0)


# ---- the real data and the real library

OFFICIAL = {
    "mrpc": (3668, 408), "cola": (8551, 1043), "rte": (2490, 277), "stsb": (5749, 1500), "sst2": (67349, 872),
}  # fmt: skip
# Published balances of the validation splits: paraphrases, acceptable sentences, entailments (0), good reviews.
BALANCES = {
    "mrpc": {1: 279, 0: 129}, "cola": {1: 721, 0: 322}, "rte": {0: 146, 1: 131}, "sst2": {1: 444, 0: 428},
}  # fmt: skip


@pytest.mark.parametrize("task", OFFICIAL)
def test_the_real_tasks_have_their_official_counts(shared_file, task):
    train, test = read_bundle(shared_file, task)
    assert (len(train.labels), len(test.labels)) == OFFICIAL[task]
    assert len(train.texts) == len(TASKS[task].columns)
    if task in BALANCES:
        assert Counter(test.labels) == BALANCES[task]


def test_the_real_rows_become_examples(asked, shared_file):
    dataset = load("stsb", shared_file, max_length=64)
    assert dataset.train.targets[0].item() == 5.0  # "A plane is taking off." and "An air plane is taking off."
    assert dataset.train.inputs[0, 0, :13].tolist() == [1, 11, 15, 12, 16, 14, 2, 12, 13, 15, 12, 16, 14]


def test_a_real_tokenizer_from_a_folder_gives_ids_and_mask(bundle, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "zz"]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    inputs = load("rte", bundle, tokenizer=str(folder)).train.inputs
    assert inputs.dtype == torch.float32
    assert inputs[1].tolist() == [[2, 6, 6, 3, 8, 3, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]]
    single = load("cola", bundle, tokenizer=str(folder), max_length=8).train.inputs
    assert single[5].tolist() == [[2, 7, 7, 7, 7, 7, 7, 3], [1] * 8]


def test_rows_need_not_be_lists():
    rows = as_rows(((("a"), 0), ["b", 1]), TASKS["cola"], "here")
    assert (rows.texts, rows.labels) == ((["a", "b"],), [0, 1])
