"""A model as lm-eval sees one: whatever lm-eval asks of it becomes tokens, and goes to whoever answers for the model (asking.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minitron.errors import RequestError, refuse
from minitron.evaluation.asking import Judge, Write
from minitron.evaluation.choices import Request
from minitron.evaluation.tasks import MAX_WRITTEN


class ShardedLM(TemplateLM):
    """The model behind `ask`, which takes a `Judge` or a `Write`. Texts become tokens, and long ones are cut, as lm-eval's own backend does it."""

    def __init__(self, ask: Callable[[Judge | Write], Any], tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.ask, self.tokenizer, self.max_length = ask, tokenizer, max_length

    @property
    def eot_token_id(self) -> int:
        """The token between documents."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """The tokens of a text, with those that the tokenizer itself puts around one, unless it begins with them already."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return list(self.tokenizer.encode(string, **({} if add_special_tokens is None else {"add_special_tokens": add_special_tokens})))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of (context, ending) the log-likelihood of the ending, and whether it is what the model would write."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **unused: Any) -> list[tuple[float, bool]]:
        longest = max((len(ending) for _, _, ending in requests), default=0)
        if longest > self.max_length:
            raise refuse("eval.max_length", self.max_length, f"an ending of {longest} tokens is asked about")
        if not requests:
            return []
        # a context may be text and yet no token: blanks, to some tokenizers
        asked = [Request([*(context or [self.prefix_token_id]), *ending][-self.max_length - 1 :], len(ending)) for _, context, ending in requests]
        return list(self.ask(Judge.of(asked)))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of whole texts, cut into windows in which every token is predicted once."""
        windows = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1):
                windows.append((number, *make_disjoint_window(window)))
        sums = [0.0] * len(requests)
        for (number, _, _), (found, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += found
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, the most probable token every time, up to what the task says ends it."""
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            wanted = normalize_gen_kwargs(request.args[1], MAX_WRITTEN)
            if wanted["do_sample"]:
                raise RequestError("tokens can't be drawn at random here: do_sample=false is needed")
            groups.setdefault((tuple(wanted["until"]), wanted["max_gen_toks"]), []).append(number)
        texts = [""] * len(requests)
        for (until, most), numbers in groups.items():
            if most >= self.max_length:
                raise refuse("eval.max_length", self.max_length, f"more than the {most} tokens of an answer are needed")
            prompts = [self.tok_encode(requests[number].args[0])[-(self.max_length - most) :] or [self.prefix_token_id] for number in numbers]
            stops = [*until, self.tokenizer.decode(self.eot_token_id)]
            for number, text in zip(numbers, self.ask(Write(prompts, stops, most)), strict=True):
                texts[number] = text
        return texts
