"""How fast models generate, side by side: a process for each, which take turns, so that what else goes on in the machine meets all alike."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from minitron.arch.arch import Arch
from minitron.config.speed import Speed
from minitron.errors import RequestError, refuse, say_once
from minitron.evaluation.generating import Load, Order, Ready, Turn

PLAIN, VLLM = "transformers", "vllm"
PATIENCE = 10.0  # seconds that a process may take to end by itself
# what torchrun tells its processes: a model that is measured is in no group of them
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """Where and how models are loaded: torch's device, what to call it, the type."""

    device: str
    name: str
    dtype: str


def check_speed(settings: Speed, arch: Arch, device: str) -> None:
    """Refuse sequences with more positions than the model has learned, and vLLM where it is not. `device`: as the setting has it."""
    longest = max(settings.prompt_lengths, default=0) + settings.new_tokens
    for name in ("batch_sizes", "prompt_lengths"):
        if not getattr(settings, name):
            raise refuse(f"speed.{name}", [], "one number at least is needed")
    if arch.learned_positions and longest > arch.max_position_embeddings:
        allowed = f"with speed.new_tokens={settings.new_tokens}, at most the model's {arch.max_position_embeddings} learned positions"
        raise refuse("speed.prompt_lengths", settings.prompt_lengths, allowed)
    if settings.vllm and importlib.util.find_spec(VLLM) is None:
        raise refuse("speed.vllm", True, "the package vllm is not installed; null or false is needed")
    engines(settings, device)


def engines(settings: Speed, device: str) -> list[str]:
    """What models are measured with on this device. Raises RequestError where vLLM is asked for without a GPU."""
    if settings.vllm and device == "cpu":
        raise refuse("speed.vllm", True, "a GPU is needed with it")
    there = settings.vllm is not False and device != "cpu" and importlib.util.find_spec(VLLM) is not None
    return [PLAIN, *([VLLM] if there else [])]


def loads(settings: Speed) -> list[Load]:
    """Every combination that is measured, the smallest first."""
    sizes = itertools.product(sorted({*settings.prompt_lengths}), sorted({*settings.batch_sizes}))
    return [Load(batch_size, prompt_length, settings.new_tokens) for prompt_length, batch_size in sizes]


def turns(settings: Speed, device: str) -> int:
    """How many generations `measure` does of each model."""
    return len(engines(settings, device)) * len(loads(settings)) * (1 + settings.repeats)


def measure(
    models: Mapping[str, Path],
    settings: Speed,
    place: Place,
    advance: Callable[[], object] = lambda: None,
    keep: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """What speed.json holds, of folders by the names of the models; `advance` is called after each generation, `keep` with what there is whenever
    an engine is through.

    Raises RequestError where a model can't be loaded or does not get through, as where memory is short; with vLLM, where it was not asked for, that
    is said in a line and it is left out.
    """
    found: dict[str, Any] = {"device": place.name, "dtype": place.dtype, "repeats": settings.repeats, "threads": None, "software": {}, "engines": {}}
    for engine in engines(settings, place.device):
        # vLLM takes its memory beforehand, so that two models at a time would have half of it each
        together = [models] if engine == PLAIN else [{name: folder} for name, folder in models.items()]
        try:
            parts = [measured(engine, some, settings, place, advance) for some in together]
        except RequestError as error:
            if engine == PLAIN or settings.vllm:
                raise
            say_once(f"{engine} is left out: {error}; speed.vllm=false does not try it")
            continue
        first = parts[0][0]
        found["software"] |= first.software
        found["threads"] = found["threads"] or first.threads
        found["engines"][engine] = {name: entry for _, entries in parts for name, entry in entries.items()}
        keep(found)
    return found


def measured(
    engine: str, models: Mapping[str, Path], settings: Speed, place: Place, advance: Callable[[], object]
) -> tuple[Ready, dict[str, dict[str, Any]]]:
    """Models that are loaded at the same time and take turns: what the first of them said when it was ready, and the entry of each."""
    longest = max(settings.prompt_lengths) + settings.new_tokens
    with contextlib.ExitStack() as held:
        sides = {
            name: held.enter_context(side(name, Order(engine, str(folder), place.device, place.dtype, settings.threads, longest)))
            for name, folder in models.items()
        }
        ready = {name: Ready(**one.answer()) for name, one in sides.items()}
        entries: dict[str, dict[str, Any]] = {
            name: {"weights_bytes": one.weights, "before_bytes": one.before, "loads": []} for name, one in ready.items()
        }
        for load in loads(settings):
            done = alternate(sides, load, settings.repeats, advance)
            for name, entry in entries.items():
                entry["loads"].append(told(load, done[name]))
    return next(iter(ready.values())), entries


def alternate(sides: Mapping[str, Side], load: Load, repeats: int, advance: Callable[[], object]) -> dict[str, list[Turn]]:
    """Turns of every side, one after another, the first of each left out; who begins changes from round to round."""
    done: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(1 + repeats):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            turn = Turn(**sides[name].ask(load))
            done[name] += [turn] if number else []
            advance()
    return done


def told(load: Load, turns: list[Turn]) -> dict[str, Any]:
    """One load's entry: the seconds of each turn, and the most memory of any."""
    peaks = [turn.peak for turn in turns if turn.peak is not None]
    return {
        **load._asdict(),
        "first_seconds": [turn.first for turn in turns],
        "other_seconds": [turn.others for turn in turns],
        "peak_bytes": max(peaks) if peaks else None,
    }


class Side:
    """One model's process, seen from outside."""

    def __init__(self, name: str, process: subprocess.Popen[str], said: IO[str]) -> None:
        self.name, self.process, self.said = name, process, said

    def ask(self, what: Order | Load) -> dict[str, Any]:
        """A request, and the answer to it."""
        self.send(what)
        return self.answer()

    def send(self, what: Order | Load) -> None:
        """A request."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # there will be no answer, and that is told
            print(json.dumps(what._asdict()), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises RequestError where the process ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line.endswith("\n"):
            return dict(json.loads(line))
        code = self.process.wait()
        self.said.seek(0)
        lines = [text.strip() for text in self.said if text.strip()]
        why = f"killed by signal {-code}, as where memory is short" if code < 0 else lines[-1] if lines else f"exit code {code}"
        raise RequestError(f"the speed of the {self.name} could not be measured: {why}")


@contextlib.contextmanager
def side(name: str, order: Order) -> Iterator[Side]:
    """A model's process while the block runs; it begins to load at once."""
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {key: value for key, value in os.environ.items() if key not in OF_RANKS and not key.startswith("TORCHELASTIC_")}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "minitron.evaluation.generating"], env=environment, text=True, stderr=said,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            found = Side(name, process, said)
            found.send(order)
            yield found
        finally:
            end(process)


def end(process: subprocess.Popen[str], patience: float = PATIENCE) -> None:
    """Let a process end, as it does when nothing is asked any more, and after `patience` seconds end it and what it started, which may hold a GPU's
    memory."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):  # what was asked last may not have been read
        process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()  # which an orphan may hold open: it is not read to its end
