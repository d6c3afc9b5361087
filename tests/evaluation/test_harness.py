"""A sharded model under lm-eval against lm-eval's own backend for `transformers`, on a small trained model: all three kinds of request."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from minitron import engine
from minitron.data.tokenizing import load_tokenizer
from minitron.errors import RequestError
from minitron.evaluation.asking import Judge, Write, conducted, end_tokens, judged
from minitron.evaluation.choices import Request
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.evaluation.answering import answers_of
from tests.multirank.ranks import Layout, on_ranks

pytest.importorskip("lm_eval", reason="the Python package lm-eval is not installed")

LENGTH = 96  # longest sequence, in tokens
TALE = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
ENDINGS = {  # context, ending
    "plain": ("Once upon a time, there was", " a little girl"),
    "another": ("Once upon a time, there was", " a big dog who ran home"),
    "space_before": ("The bird saw a ", "cat"),
    "no_context": ("", "Tim went to the park."),
    "no_context_but_a_start": ("", "<s>Tim"),
    "one_token": ("Lily was very happy", "."),
    "other_token": ("Lily was very happy", "!"),
    "one_letter": ("Lily was very happy", "x"),
    "too_long": (TALE * 4, " It was big."),
    "likeliest": ("Once upon a time", ", there was a little girl named Lily. She loved to play"),
}
TEXTS = ["The sun was hot.", TALE, TALE * 3, "a"]
WRITTEN = [  # prompt, what lm-eval's tasks say of the answer
    ("Once upon a time", {"until": ["."], "max_gen_toks": 40}),
    ("One day, Tim", {"until": ["."], "max_gen_toks": 40}),
    ("Lily had a red ball. " * 9, {"until": ["."], "max_gen_toks": 40}),
    ("The dog", {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 11}),
    ("It was cold and", {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 11}),
    ("They said", {"until": ["zzz"], "max_gen_toks": 7}),
]


def asked(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


REQUESTS = {"loglikelihood": list(ENDINGS.values()), "loglikelihood_rolling": [(text,) for text in TEXTS], "generate_until": WRITTEN}


@pytest.fixture(scope="module")
def by_lm_eval(stories):
    """What lm-eval's own backend answers, by kind of request."""
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    own = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(stories), batch_size=3, max_length=LENGTH, device="cpu")
    return {kind: getattr(own, kind)(asked(kind, arguments), disable_tqdm=True) for kind, arguments in REQUESTS.items()}


def alone_at(world, folder):
    """(job, its answer) of each job that REQUESTS become, and the answers by kind of request."""
    from minitron.evaluation.harness import ShardedLM

    answers, record = answers_of(world, folder), []

    def ask(job):
        record.append((job, answers(job)))
        return record[-1][1]

    lm = ShardedLM(ask, load_tokenizer(str(folder)), LENGTH)
    return record, {kind: getattr(lm, kind)(asked(kind, arguments)) for kind, arguments in REQUESTS.items()}


@pytest.fixture(scope="module")
def jobs(stories):
    """What `alone_at` gives by a model on one rank."""
    return on_ranks(alone_at, Layout(), stories)[0]


def test_every_kind_of_request_is_answered_as_by_lm_evals_own_backend(jobs, by_lm_eval):
    _, found = jobs
    for (loss, greedy), (expected, expected_greedy), name in zip(found["loglikelihood"], by_lm_eval["loglikelihood"], ENDINGS, strict=True):
        assert loss == pytest.approx(expected, abs=1e-4), name
        assert greedy == expected_greedy, name
    assert {greedy for _, greedy in found["loglikelihood"]} == {True, False}
    assert found["loglikelihood_rolling"] == pytest.approx(by_lm_eval["loglikelihood_rolling"], rel=1e-5, abs=1e-4)
    assert found["generate_until"] == by_lm_eval["generate_until"]
    assert all(found["generate_until"]) and not any("." in text for text in found["generate_until"][:3])


def answered_at(world, folder, jobs):
    """(what rank 0 was answered, whether a refusal of its came to this rank)."""
    answers = answers_of(world, folder)
    found = conducted(world, answers, lambda ask: [ask(job) for job in jobs])

    def refuse(ask):
        ask(jobs[0])
        raise RequestError("not this one")

    try:
        conducted(world, answers, refuse)
    except RequestError as error:
        return found, str(error)


@pytest.mark.multirank
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, sp=True),
        Layout(pp=2),
        Layout(dp=2),
        *(pytest.param(some, marks=pytest.mark.slow) for some in (Layout(cp=2), Layout(pp=2, vpp=2), Layout(tp=2, pp=2, dp=2))),
    ],
    ids=str,
)
def test_the_answers_are_the_same_at_every_layout(layout, jobs, stories):
    record, _ = jobs
    ranks = on_ranks(answered_at, layout, stories, [job for job, _ in record])
    assert all(refusal == "not this one" for _, refusal in ranks) and all(found is None for found, _ in ranks[1:])
    for found, (job, expected) in zip(ranks[0][0], record, strict=True):
        if isinstance(job, Judge):
            assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=1e-4)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        else:
            assert found == expected


def test_requests_travel_as_arrays_and_share_what_the_model_reads():
    requests = [Request([5, 6, 7, 1], 1), Request([5, 6, 7, 2], 1), Request([5, 6, 7, 3], 2), Request([9, 8], 1), Request([4, *range(40)], 3)]
    there = Judge.of(requests).requests()
    assert [(one.tokens.tolist(), one.ending) for one in there] == [(one.tokens, one.ending) for one in requests]
    batches = [*judged(there, 64, 1)]
    assert [tuple(batch.inputs_BS.shape) for batch in batches] == [(2, 32), (1, 64)]
    short = batches[0]
    assert short.inputs_BS[:, :3].tolist() == [[5, 6, 7], [9, 0, 0]]
    judgements = sorted(zip(short.requests_M.tolist(), short.rows_M.tolist(), short.positions_M.tolist(), short.labels_M.tolist(), strict=True))
    assert judgements == [(0, 0, 2, 1), (1, 0, 2, 2), (2, 0, 1, 7), (2, 0, 2, 3), (3, 1, 0, 8)]


def test_what_cannot_be_asked_is_refused(stories):
    from minitron.evaluation.harness import ShardedLM

    lm = ShardedLM(None, load_tokenizer(str(stories)), 16)
    with pytest.raises(RequestError, match="do_sample=false is needed"):
        lm.generate_until(asked("generate_until", [("a", {"temperature": 0.7})]))
    with pytest.raises(RequestError, match=r"eval.max_length=16: more than the 16 tokens of an answer are needed"):
        lm.generate_until(asked("generate_until", [("a", {"max_gen_toks": 16})]))
    with pytest.raises(RequestError, match=r"eval.max_length=16: an ending of"):
        lm.loglikelihood(asked("loglikelihood", [("a", TALE)]))
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == lm.generate_until([]) == []


def test_a_context_without_a_token_is_what_a_text_begins_with(stories):
    from minitron.evaluation.harness import ShardedLM

    seen = []
    lm = ShardedLM(lambda job: seen.append(job) or [(0.0, True)] * len(job.lengths), load_tokenizer(str(stories)), 4)
    lm._loglikelihood_tokens([((" ", "a"), [], [7, 8]), (("", "a"), [], [5, 6, 7, 8]), (("b", "a"), [9], [7])])
    assert [one.tokens.tolist() for one in seen[0].requests()] == [[lm.prefix_token_id, 7, 8], [lm.prefix_token_id, 5, 6, 7, 8], [9, 7]]
    with pytest.raises(AssertionError, match="predicted from those before it"):
        [*judged([Request([7, 8], 2)], 64, 1)]


def test_padding_may_run_past_learned_positions(alone, tmp_path):
    """The longest text that a GPT-2 of 40 positions reads is padded to 64; so is what it writes on from."""
    torch.manual_seed(0)
    own = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=40, n_embd=24, n_layer=2, n_head=3)).eval()
    own.save_pretrained(tmp_path)
    model = load(open_folder(tmp_path, "model.path"), alone, torch.float32)
    text = torch.randint(0, 61, (41,)).tolist()
    losses, _ = engine.judge(model, judged([Request(text, 40)], 64, 1), alone, 1)
    with torch.no_grad():
        logits = own(torch.tensor([text[:40]])).logits[0]
    assert losses[0].item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="sum").item(), rel=1e-5)
    assert engine.write_greedily(model, [text[:40]], alone, lambda *_: True, 64, 32) == [[logits[-1].argmax().item()]]


def test_a_model_stops_where_it_was_made_to(tmp_path, stories):
    tokenizer = load_tokenizer(str(stories))
    assert end_tokens(stories, tokenizer) == {tokenizer.eos_token_id}
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_tokens(tmp_path, tokenizer) == {tokenizer.eos_token_id, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert end_tokens(tmp_path, tokenizer) == {tokenizer.eos_token_id, 8, 9}


def test_a_prompt_is_cut_at_its_beginning(stories):
    from minitron.evaluation.harness import ShardedLM

    seen = []
    lm = ShardedLM(lambda job: seen.append(job) or [""], load_tokenizer(str(stories)), 32)
    lm.generate_until(asked("generate_until", [(TALE, {"until": ["."], "max_gen_toks": 20})]))
    (job,) = seen
    assert isinstance(job, Write) and job.most == 20 and job.until[0] == "."
    assert job.prompts[0] == lm.tok_encode(TALE)[-12:]
    assert np.asarray(job.prompts[0]).max() < 512
