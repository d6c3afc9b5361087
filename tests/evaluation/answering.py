"""What answers for a model of a folder."""

import contextlib

import torch

from minitron.data.tokenizing import load_tokenizer
from minitron.evaluation.asking import Answers, end_tokens
from minitron.weights.load import load
from minitron.weights.source import open_folder


def answers_of(world, folder):
    """The model of a Hugging Face folder at the layout of `world`, in fp32, with few tokens at a time."""
    tokenizer = load_tokenizer(str(folder))
    model = load(open_folder(folder, "model.path"), world, torch.float32)
    quiet = lambda what, total: contextlib.nullcontext(lambda count=1: None)  # noqa: E731
    return Answers(model, world, tokenizer, end_tokens(folder, tokenizer), tokens=160, progress=quiet)
