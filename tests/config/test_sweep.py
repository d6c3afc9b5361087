"""Sweeps in Hydra's syntax: their runs, what these are called, what is refused."""

import pytest

from minitron.config.compose import choices
from minitron.config.sweep import expand
from minitron.errors import RequestError

RECIPES = "smollm2_135m_to_100m,smollm2_135m_to_106m_depth"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([f"recipe={RECIPES}", "seed=1"], RECIPES.split(",")),
        (["train.lr=1e-4,2e-4"], ["lr-0.0001", "lr-0.0002"]),
        (["train.steps=range(10,31,10)"], ["steps-10", "steps-20", "steps-30"]),
        (["seed=choice(1,2)", "distill.loss=jsd,forward_kl"], [f"seed-{seed}_loss-{loss}" for seed in (1, 2) for loss in ("jsd", "forward_kl")]),
        (["data.train='a/b.jsonl','c d.txt'"], ["train-a_b.jsonl", "train-c_d.txt"]),
        (["train.seq_length=1,2", "eval.seq_length=3"], ["seq_length-1", "seq_length-2"]),
        (["train.seq_length=1,2", "eval.seq_length=3,4"], [f"train.seq_length-{one}_eval.seq_length-{other}" for one in (1, 2) for other in (3, 4)]),
        (["train.steps=1,11", "search.values=1,11"], ["steps-1_values-1", "steps-1_values-11", "steps-11_values-1", "steps-11_values-11"]),
        (["recipe=glob(smollm2*,exclude=*search*)"], [name for name in choices("recipe") if name.startswith("smollm2") and "search" not in name]),
    ],
)
def test_the_runs_and_their_names(words, names):
    runs = expand(words)
    assert [*runs] == names
    assert all(len(own) == len(words) for own, _ in runs.values())


def test_each_run_has_one_value_of_what_is_swept_and_the_rest_as_it_is():
    runs = expand(["seed=1", "train.lr=1e-4,2e-4", "data.train='a,b'"])
    assert runs["lr-0.0002"] == (["seed=1", "train.lr=0.0002", "data.train='a,b'"], {"train.lr": "0.0002"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "--sweep: no setting has several values"),
        (["seed=1,1"], "--sweep: two of the runs would have the same name, seed-1"),
        (["train.lr=interval(0,1)"], "train.lr=interval(0,1): values one by one are needed"),
        (["data.train=glob(*)"], "data.train=glob(*): glob(...) picks among files of configs/"),
    ],
)
def test_sweeps_that_are_refused(words, said):
    with pytest.raises(RequestError) as refused:
        expand(words)
    assert str(refused.value).startswith(said)
