"""Multiple-choice questions: read, put as text, answered by the likelihood of each choice (as lm-eval's tasks of the same names do).

A question gives a context and an ending for each choice; the chosen one is that whose ending is the most likely after its context, where a
format is `normalised` divided by the choice's characters. Pure but for `read`.

Legend: B sequences, S positions, T = S + 1 tokens, N requests (a question's choices, one after another), P models that answered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitron import engine
from minitron.errors import RequestError, refuse
from minitron.packages import PREFIX, resolve_package

Tensor = torch.Tensor
Record = Mapping[str, Any]
PAD_TO = 32  # sequences are padded to multiples of it, so that many are of one shape


class Question(NamedTuple):
    """One question: of each choice the context and the ending, its characters; the number of the right one."""

    contexts: list[str]
    endings: list[str]
    lengths: list[int]
    answer: int


class Format(NamedTuple):
    """How a set writes its questions: the fields that tell it from others, a record's question, whether likelihoods are normalised."""

    fields: frozenset[str]
    question: Callable[[Record], Question]
    normalised: bool


def after(context: str, choices: Sequence[str], answer: int) -> Question:
    """Every choice after one context."""
    return Question([context] * len(choices), [f" {choice}" for choice in choices], [len(choice) for choice in choices], answer)


def winogrande(record: Record) -> Question:
    """Each option fills the blank; the ending is what stands behind it."""
    before, _, behind = record["sentence"].partition("_")
    options = [record["option1"], record["option2"]]
    return Question(
        [before + option for option in options], [f" {behind.strip()}"] * 2, [len(option) for option in options], int(record["answer"]) - 1
    )


def hellaswag(record: Record) -> Question:
    """How a scene goes on."""

    def plain(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    scene = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return after(plain(scene), [plain(ending) for ending in record["endings"]], int(record["label"]))


def arc(record: Record) -> Question:
    """A question of a school's examination."""
    choices = record["choices"]
    return after(f"Question: {record['question']}\nAnswer:", choices["text"], list(choices["label"]).index(record["answerKey"]))


def piqa(record: Record) -> Question:
    """Which of two ways reaches a goal."""
    return after(f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], int(record["label"]))


def own(record: Record) -> Question:
    """A user's own questions."""
    return after(record["context"], record["choices"], int(record["answer"]))


FORMATS = {
    "winogrande": Format(frozenset({"sentence", "option1", "option2", "answer"}), winogrande, normalised=False),
    "hellaswag": Format(frozenset({"activity_label", "ctx_a", "ctx_b", "endings", "label"}), hellaswag, normalised=True),
    "ai2_arc": Format(frozenset({"question", "choices", "answerKey"}), arc, normalised=True),
    "piqa": Format(frozenset({"goal", "sol1", "sol2", "label"}), piqa, normalised=False),
    "own": Format(frozenset({"context", "choices", "answer"}), own, normalised=True),
}


def read(given: str, setting: str, count: int) -> tuple[list[Question], bool]:
    """The first `count` questions of a .jsonl or .parquet file, or of the validation split of a hub id, and whether their format is normalised.

    Raises RequestError, naming `setting`, for what can't be read or is in no known format.
    """
    try:
        rows = list(islice(records(given, setting), count))
    except RequestError:
        raise
    except Exception as error:  # errors of half a dozen libraries: not found, offline, no such split, not JSON, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise refuse(setting, given, f"no file, and no set with a split validation, that can be read: {reason}") from error
    form = next((form for form in FORMATS.values() if rows and form.fields <= rows[0].keys()), None)
    if form is None:
        known = "; ".join(f"{', '.join(sorted(form.fields))} ({name})" for name, form in FORMATS.items())
        raise refuse(setting, given, f"records with one of these sets of fields are needed: {known}")
    questions = []
    for number, row in enumerate(rows):
        try:
            question = form.question(row)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise refuse(setting, given, f"record {number} is no question: {type(error).__name__} {error}") from error
        if not 0 <= question.answer < len(question.endings):
            raise refuse(setting, given, f"record {number}: its answer is {question.answer}, of {len(question.endings)} choices counted from 0")
        questions.append(question)
    return questions, form.normalised


KINDS = {".jsonl": "json", ".parquet": "parquet"}


def records(given: str, setting: str) -> Iterator[Record]:
    """The rows of a file or a hub's set, streamed."""
    import datasets

    path = resolve_package(given, setting) if given.startswith(PREFIX) else Path(given).expanduser()
    if path.is_file():
        kind = KINDS.get(path.suffix)
        if kind is None:
            raise refuse(setting, given, f"a file must end in {' or '.join(KINDS)}")
        yield from datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        return
    if path.suffix in KINDS:  # a file's name: the hub need not be asked
        raise refuse(setting, given, "no such file")
    name, _, config = given.partition(":")
    yield from datasets.load_dataset(str(path) if path.is_dir() else name, config or None, split="validation", streaming=True)


class Request(NamedTuple):
    """One choice of a question as tokens, of which the last `ending` are judged."""

    tokens: list[int]
    ending: int


def requests(questions: Sequence[Question], tokenizer: Any, limit: int) -> list[Request]:
    """Every choice of every question, in order. Of one longer than `limit` + 1 tokens the end is left.

    Spaces at a context's end go to the ending, which is tokenised together with it; before an empty context stands the token that opens a document.
    """
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    found = []
    for question in questions:
        for context, ending in zip(question.contexts, question.endings, strict=True):
            bare = context.rstrip()
            whole = tokenizer.encode(context + ending, add_special_tokens=False)
            before = len(tokenizer.encode(bare, add_special_tokens=False)) if bare else 0
            tokens = whole if before else [opening, *whole]
            found.append(Request(tokens[-limit - 1 :], min(len(whole) - before, limit)))
    return found


def by_length(lengths: Sequence[int], tokens: int, ways: int) -> Iterator[tuple[int, list[int]]]:
    """Sequences of these lengths for one microbatch after another, those of one padded length together: (that length, their numbers). A microbatch
    holds at most `tokens` tokens, or one sequence.

    `ways`: what the length of a sequence must be divisible by.
    """
    step = padding(ways)
    numbers_of: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        numbers_of.setdefault(math.ceil(length / step) * step, []).append(number)
    for length, numbers in sorted(numbers_of.items()):
        most = max(1, tokens // length)
        for start in range(0, len(numbers), most):
            yield length, numbers[start : start + most]


def padding(ways: int) -> int:
    """What lengths are padded to multiples of."""
    return ways * math.ceil(PAD_TO / ways)


def microbatches(asked: Sequence[Request], tokens: int, ways: int) -> Iterator[engine.Scored]:
    """All requests in microbatches `by_length`, padded at the end. The sum of request n is row n."""
    for length, rows in by_length([len(request.tokens) - 1 for request in asked], tokens, ways):
        tokens_BT = torch.zeros(len(rows), length + 1, dtype=torch.int64)
        counted_BS = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, request in enumerate(asked[number] for number in rows):
            tokens_BT[row, : len(request.tokens)] = torch.tensor(request.tokens)
            counted_BS[row, len(request.tokens) - 1 - request.ending : len(request.tokens) - 1] = True
        yield engine.Scored(tokens_BT, counted_BS, torch.tensor(rows))


def accuracy(losses_PN: Tensor, questions: Sequence[Question], normalised: bool) -> Tensor:
    """[P]: the share of questions whose right choice has the least loss (of its ending, in nats; per character where normalised)."""
    right_P = torch.zeros(len(losses_PN), dtype=torch.float64)
    lengths = [len(question.endings) for question in questions]
    for question, choices_PC in zip(questions, losses_PN.double().split(lengths, dim=1), strict=True):
        per_character = torch.tensor(question.lengths, dtype=torch.float64) if normalised else 1.0
        right_P += (choices_PC / per_character).argmin(dim=1) == question.answer
    return right_P / len(questions)
