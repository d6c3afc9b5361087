"""Questions as each set writes them, the tokens that are judged, the choice that is made; likelihoods against plain `transformers`."""

import json
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.errors import RequestError
from minitron.evaluation.choices import Question, accuracy, microbatches, read, requests
from minitron.importance.depth import sums_without
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks

RECORDS = {
    "winogrande": (
        {"sentence": "The key fits no lock, as the _ is bent. So we wait.", "option1": "key", "option2": "lock", "answer": "2"},
        Question(["The key fits no lock, as the key", "The key fits no lock, as the lock"], [" is bent. So we wait."] * 2, [3, 4], 1),
        False,
    ),
    "hellaswag": (
        {
            "activity_label": "Baking", "ctx_a": "[header] A cake [title] Dough.", "ctx_b": "the cook",
            "endings": ["stirs  it.", " sleeps. [step]"], "label": "0",
        },
        Question(["Baking: A cake. Dough. The cook"] * 2, [" stirs it.", " sleeps. "], [9, 8], 0),
        True,
    ),
    "ai2_arc": (
        {"question": "Which is hot?", "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        Question(["Question: Which is hot?\nAnswer:"] * 3, [" ice", " fire", " snow"], [3, 4, 4], 1),
        True,
    ),
    "piqa": (
        {"goal": "Open a jar.", "sol1": "Turn it.", "sol2": "Sing to it.", "label": 0},
        Question(["Question: Open a jar.\nAnswer:"] * 2, [" Turn it.", " Sing to it."], [8, 11], 0),
        False,
    ),
    "own": (
        {"context": "Two and two are", "choices": ["five", "four"], "answer": 1},
        Question(["Two and two are"] * 2, [" five", " four"], [4, 4], 1),
        True,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", RECORDS)
def test_the_formats_are_told_by_their_fields(name, tmp_path):
    record, question, normalised = RECORDS[name]
    file = written(tmp_path / "set.jsonl", *[record] * 3)
    assert read(file, "calibrate.choices", 2) == ([question] * 2, normalised)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"text": "no question"}], "records with one of these sets of fields are needed: .*winogrande"),
        ([], "no file, and no set"),
        ([RECORDS["own"][0], {"context": "a", "choices": ["b", "c"], "answer": 2}], "record 1: its answer is 2, of 2 choices counted from 0"),
        ([RECORDS["own"][0], {"context": "a", "choices": None, "answer": 0}], "record 1 is no question"),
    ],
    ids=["fields", "nothing", "answer", "null"],
)
def test_what_is_no_question_is_refused(lines, said, tmp_path):
    with pytest.raises(RequestError, match=f"calibrate.choices=.*{said}") as refusal:
        read(written(tmp_path / "set.jsonl", *lines), "calibrate.choices", 10)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("given", "said"), [("set.txt", "a file must end in .jsonl or .parquet"), ("absent.jsonl", "no such file")])
def test_what_is_no_file_of_questions_is_refused(given, said, tmp_path):
    (tmp_path / "set.txt").write_text("a")
    with pytest.raises(RequestError, match=said):
        read(str(tmp_path / given), "calibrate.choices", 1)


def test_a_set_of_several_configurations_is_refused_with_their_names(tmp_path):
    for name in ("easy", "hard"):
        written(tmp_path / f"{name}.jsonl", RECORDS["own"][0])
    configs = "".join(f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}.jsonl\n" for name in ("easy", "hard"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    with pytest.raises(RequestError, match="'easy', 'hard'") as refusal:
        read(str(tmp_path), "calibrate.choices", 1)
    assert "\n" not in str(refusal.value)
    assert read(f"{tmp_path}:easy", "calibrate.choices", 1)[0] == [RECORDS["own"][1]]


@pytest.mark.parametrize(
    ("given", "choices"), [("allenai/winogrande", 2), ("Rowan/hellaswag", 4), ("allenai/ai2_arc:ARC-Easy", None), ("baber/piqa", 2)]
)
def test_sets_as_the_hub_has_them(given, choices, data_root, monkeypatch):
    if not (data_root / "hub").is_dir():
        pytest.skip(f"no hub in {data_root}")
    monkeypatch.chdir(data_root / "hub")
    questions, _ = read(given, "calibrate.choices", 20)
    assert len(questions) == 20 and all(len(question.endings) == (choices or len(question.lengths)) for question in questions)
    assert len({question.answer for question in questions}) > 1
    assert read(os.path.abspath(given.partition(":")[0]) + given[len(given.partition(":")[0]) :], "calibrate.choices", 20)[0] == questions


QUESTIONS = [
    Question(["Once upon a time"] * 3, [" there was", " a", " the dog ran home"], [9, 1, 16], 0),
    Question(["Tim saw a ", ""], ["cat", "It was a big day."], [3, 17], 1),
    Question(["The bird " * 30] * 2, [" sang.", " fell."], [4, 4], 0),
]


def test_the_endings_of_what_fits_are_judged(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    asked = requests(QUESTIONS, tokenizer, 40)
    assert len(asked) == 7
    assert all(len(request.tokens) <= 41 and 0 < request.ending < len(request.tokens) for request in asked)
    texts = [tokenizer.decode(request.tokens[-request.ending :]) for request in asked]
    assert [text.strip() for text in texts[:4]] == ["there was", "a", "the dog ran home", "cat"]
    assert asked[4].tokens[0] == tokenizer.bos_token_id and asked[4].ending == len(asked[4].tokens) - 1
    batches = list(microbatches(asked, 64, 3))
    assert sorted(row for batch in batches for row in batch.rows_B.tolist()) == list(range(7))
    for tokens_BT, counted_BS, rows_B in batches:
        length = tokens_BT.size(1) - 1
        assert length % 3 == 0 and length >= 32 and (tokens_BT.numel() <= 64 + len(rows_B) or len(rows_B) == 1)
        for row, number in enumerate(rows_B.tolist()):
            request = asked[number]
            assert tokens_BT[row, : len(request.tokens)].tolist() == request.tokens
            assert tokens_BT[row, 1:][counted_BS[row]].tolist() == request.tokens[-request.ending :]


def test_the_likeliest_choice_counts():
    losses = torch.tensor([[9.0, 2.0, 8.0, 3.0, 17.0, 1.0, 2.0], [9.0, 9.5, 16.1, 6.0, 3.0, 2.0, 1.0]])
    assert accuracy(losses, QUESTIONS, normalised=False).tolist() == pytest.approx([1 / 3, 2 / 3])
    # per character: 1.0 2.0 0.5 | 1.0 1.0 | ..., 1.0 9.5 1.006 | 2.0 0.18 | ...
    assert accuracy(losses, QUESTIONS, normalised=True).tolist() == pytest.approx([1 / 3, 2 / 3])


def asked_at(world, folder, asked):
    """Losses of every request without each layer."""
    model = load(open_folder(folder, "model.path"), world, torch.float32)
    ways = (2 * world.cp if world.cp > 1 else 1) * (world.tp if world.sequence_parallel else 1)
    batches = list(microbatches(asked, 96, ways))[world.dp_rank :: world.dp]
    return sums_without(model, batches, world, [1], len(asked))


@pytest.mark.multirank
@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2, pp=2, sp=True),
        *(pytest.param(some, marks=pytest.mark.slow) for some in (Layout(dp=2), Layout(cp=2), Layout(pp=2, vpp=2))),
    ],
    ids=str,
)
def test_likelihoods_are_those_of_plain_models(layout, stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    asked = requests(QUESTIONS, tokenizer, 48)
    layers = 5
    expected = np.empty((layers, len(asked)))
    for layer in range(layers):
        model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
        del model.model.layers[layer]
        for number, block in enumerate(model.model.layers):
            block.self_attn.layer_idx = number
        model.config.num_hidden_layers -= 1
        for number, (tokens, ending) in enumerate(asked):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -ending - 1 : -1]
            expected[layer, number] = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(tokens[-ending:]), reduction="sum")
    for sums, counts in on_ranks(asked_at, layout, stories, asked):
        np.testing.assert_allclose(sums[1], expected, rtol=1e-5)
        assert counts.tolist() == [request.ending for request in asked]
