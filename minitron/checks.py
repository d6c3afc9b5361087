"""What a request can be refused for before any model is loaded: from its settings, from the model's sizes, from the numbers of tokens."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from minitron.arch.arch import Arch
from minitron.config.layout import check_expert_ranks
from minitron.config.schema import Config, Distill
from minitron.config.setting import MISSING
from minitron.config.verbs import VERBS, groups_of, measures_again
from minitron.data.lengths import taken, windows_in
from minitron.data.manifest import Manifest
from minitron.data.sources import check_source
from minitron.data.tokenizing import differing_token, load_tokenizer
from minitron.distillation.cache import MANIFEST, Cache, settled
from minitron.distillation.hidden import pairs_of
from minitron.errors import RequestError, refuse
from minitron.evaluation.choices import read
from minitron.evaluation.speed import check_speed
from minitron.evaluation.tasks import check_installed
from minitron.pruning.keep import by_answers, skipped_at_a_time
from minitron.pruning.target import check_layout, check_questions, check_rounds, check_smaller, check_ways, target_arch
from minitron.reporting.tracking import SINKS, absent
from minitron.search.budget import check_free, find
from minitron.search.candidates import wanted
from minitron.search.ladder import trial
from minitron.search.latency import check_blocks
from minitron.weights.source import locate, open_folder

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is there where a tokenizer is


class Reading(NamedTuple):
    """Windows that a verb reads of a split of the run's data: the settings of their length and amount, and what these are."""

    split: str
    length: str
    seq_length: int
    amount: str
    limit_tokens: int | None
    windows: int | None


def readings(cfg: Config, verb: str) -> Iterator[Reading]:
    """Everything that a verb reads in windows."""
    groups = groups_of(verb, cfg)
    if {"calibrate", "data"} <= {*groups} and verb != "search" and cfg.calibrate.criterion == "activation":
        yield Reading("calibration", "calibrate.seq_length", cfg.calibrate.seq_length, "calibrate.samples", None, cfg.calibrate.samples)
    if searches(cfg, verb):
        yield Reading("valid", "train.seq_length", cfg.train.seq_length, "search.tokens", cfg.search.tokens, None)
    if verb != "search" and ("distill" in groups or VERBS[verb].trains):
        yield Reading("valid", "train.seq_length", cfg.train.seq_length, "train.eval_tokens", cfg.train.eval_tokens, None)
    if "eval" in groups:
        length, seq_length = ("eval", cfg.eval.seq_length) if cfg.eval.seq_length is not None else ("train", cfg.train.seq_length)
        for split in ("valid", *(f"text_{name}" for name in cfg.eval.texts)):
            yield Reading(split, f"{length}.seq_length", seq_length, "eval.tokens", cfg.eval.tokens, None)


def searches(cfg: Config, verb: str) -> bool:
    """Whether a verb looks for the sizes itself."""
    return verb in ("search", "compress") and bool(cfg.search.budgets)


def asks(cfg: Config, verb: str) -> bool:
    """Whether a verb has the model answer calibrate.choices: prune, where rounds rank layers by them."""
    again = verb == "prune" and measures_again(cfg.target.rounds, cfg.calibrate.criterion) and by_answers(cfg.target.layers_by)
    return verb in ("calibrate", "compress") or again


def measures_speed(cfg: Config, verb: str) -> bool:
    """Whether the verb measures how fast the export generates."""
    return verb == "speed" or ("speed" in VERBS[verb].groups and cfg.speed.enabled)


def check(cfg: Config, verb: str, to_come: bool = False, arch: Arch | None = None) -> None:
    """Everything about a request that can be told without processes: lengths and amounts, paths, texts, packages.

    `to_come`: the model is still to be made, and no more can be told of it than its sizes, if these are known; its teacher is looked at elsewhere.
    """
    groups = groups_of(verb, cfg)
    trains, distils = VERBS[verb].trains, "distill" in groups
    if searches(cfg, verb):
        check_search(cfg, verb)
    elif verb == "compress" and cfg.run.until == "search":
        raise refuse("run.until", "search", "no budget is set that could be searched for; another stage is needed")
    for name in SINKS if trains else ():
        if getattr(cfg.logging, name) and importlib.util.find_spec(name) is None:
            raise absent(name)
    if "calibrate" in groups and cfg.calibrate.compile and (missing := no_compiler(cfg.device)):
        raise refuse("calibrate.compile", True, missing)
    if cfg.calibrate.choices is not None and asks(cfg, verb):
        read(cfg.calibrate.choices, "calibrate.choices", count=1)
    if (trains or distils) and cfg.data.separate_documents and cfg.spec == "transformer_engine":
        raise refuse("data.separate_documents", True, "Transformer Engine's attention is not told of documents; use spec=auto or spec=torch")
    if distils and cfg.distill.loss == "none":
        check_no_teacher(cfg, verb)
    if distils and cfg.teacher.cache.folder is not None and cfg.distill.top_k is not None:
        raise refuse("distill.top_k", cfg.distill.top_k, "must be null with teacher.cache.folder, where teacher.cache.top_k counts in its place")
    if distils:
        check_effect(cfg.distill)
    check_lengths(cfg, verb)
    if "model" in groups and (arch := arch if to_come else known_arch(cfg.model.path)) is not None:
        check_model(cfg, verb, arch)
    if "teacher" in groups and cfg.teacher.path is not None and not to_come:
        locate(cfg.teacher.path, "teacher.path")
    if trains and cfg.teacher.cache.folder is not None:
        Cache.load(Path(cfg.teacher.cache.folder).expanduser()).check(settled(trial(cfg) if searches(cfg, verb) else cfg))
    if trains and cfg.distill.hidden.enabled and cfg.teacher_parallel != cfg.parallel:
        raise refuse("distill.hidden.enabled", True, "hidden states can't be compared over layouts: teacher.parallel.tp, .pp and .ep must be null")
    if trains and cfg.distill.hidden.enabled and cfg.teacher.cache.folder is not None:
        raise refuse("distill.hidden.enabled", True, "a cache holds no hidden states: teacher.cache.folder must be null")
    if loads_teacher(cfg, verb):
        check_teacher_ranks(cfg)
    if verb == "prune" and "data" in groups and cfg.data.train == MISSING and cfg.data.calibration is None:
        raise refuse(
            "data.train", MISSING, f"importance is measured again with target.rounds={cfg.target.rounds}: this or data.calibration is needed"
        )
    if "data" in groups:
        for name in ("train", "valid", "calibration"):
            if (spec := getattr(cfg.data, name)) not in (None, MISSING):
                check_source(spec, f"data.{name}", cfg.data.text_key, cfg.data.split, cfg.data.prompt_key)
    if "eval" in groups:
        check_installed(cfg.eval)
        for name, spec in cfg.eval.texts.items():
            check_source(spec, f"eval.texts.{name}", cfg.data.text_key, cfg.data.split)


def check_search(cfg: Config, verb: str) -> None:
    """Sizes are chosen or named, not both; the training's settings fit short distillations; cached predictions are of one order of the text."""
    check_free(cfg.target, cfg.search)
    if cfg.target.rounds > 1:
        raise refuse("target.rounds", cfg.target.rounds, "1 is needed in a search, whose candidates are cut at once")
    try:
        trial(cfg)
    except RequestError as error:
        raise refuse("search.rungs", cfg.search.rungs, f"the last is the end of a candidate's training, and there {error}") from error
    if cfg.teacher.cache.folder is not None:
        if cfg.search.seeds > 1:
            raise refuse("search.seeds", cfg.search.seeds, "1 is needed with teacher.cache.folder: a cache is of one order of the text")
        if verb == "compress" and cfg.train.steps != cfg.search.rungs[-1]:
            other = f"it would serve the last of search.rungs={cfg.search.rungs} or train.steps={cfg.train.steps}, whose orders of the text differ"
            raise refuse("teacher.cache.folder", cfg.teacher.cache.folder, f"{other}: null is needed")


def known_arch(path: str, setting: str = "model.path") -> Arch | None:
    """The sizes of a model, None where it has to be fetched or converted to tell."""
    found = Path(locate(path, setting))
    return open_folder(found, setting).arch if found.is_dir() else None


def check_effect(distill: Distill) -> None:
    """Refuse settings of the loss that nothing would read."""
    usual = Distill()
    if distill.loss != "jsd" and distill.beta != usual.beta:
        raise refuse("distill.beta", distill.beta, f"distill.loss=jsd alone has it, and this is distill.loss={distill.loss}")
    for field in dataclasses.fields(distill.hidden) if not distill.hidden.enabled else ():
        value = getattr(distill.hidden, field.name)
        if value != getattr(usual.hidden, field.name):
            raise refuse(f"distill.hidden.{field.name}", value, "distill.hidden.enabled=true is needed with it")


def no_compiler(device: str) -> str | None:
    """Why torch can't compile here, or None."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return None if importlib.util.find_spec("triton") else "the package triton is not installed; use false"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler is found (g++, or what CXX names); use false"
    return None


def check_lengths(cfg: Config, verb: str) -> None:
    """Sequences that divide by the ranks that share them, amounts that hold one (or one for each replica), steps that divide by the replicas."""
    layout = cfg.parallel
    replicas = int(os.environ.get("WORLD_SIZE", "1")) // (layout.tp * layout.pp * layout.cp)
    ways = (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if layout.sp else 1)
    shared = [(reading.length, reading.seq_length) for reading in readings(cfg, verb)]
    if searches(cfg, verb) and cfg.search.latency_ms is not None:
        shared.append(("search.seq_length", cfg.search.seq_length))
    for name, length in shared:
        if length % ways:
            allowed = (
                f"must be divisible by {ways}: 2 x parallel.cp={layout.cp} where that is above 1, times parallel.tp={layout.tp} with parallel.sp"
            )
            raise refuse(name, length, allowed)
    if "eval" in groups_of(verb, cfg) and (cfg.eval.stride or 0) > (seq_length := cfg.eval.seq_length or cfg.train.seq_length):
        raise refuse("eval.stride", cfg.eval.stride, f"at most the {seq_length} tokens of a window (eval.seq_length)")
    for reading in readings(cfg, verb):
        if reading.limit_tokens is not None and reading.limit_tokens < reading.seq_length:
            raise refuse(reading.amount, reading.limit_tokens, f"less than one window of {reading.length}={reading.seq_length} tokens")
        if reading.windows is not None and reading.windows < replicas:
            raise refuse(reading.amount, reading.windows, f"at least one per data-parallel replica, {replicas}, is needed")
    if VERBS[verb].trains:
        per_step = cfg.train.micro_batch_size * replicas * (layout.pp if layout.vpp > 1 else 1)
        if per_step and cfg.train.global_batch_size % per_step:
            stages = f" x parallel.pp={layout.pp}, as parallel.vpp needs it," if layout.vpp > 1 else ""
            raise refuse(
                "train.global_batch_size", cfg.train.global_batch_size, f"must be divisible by micro_batch_size x replicas{stages} = {per_step}"
            )


def check_model(cfg: Config, verb: str, arch: Arch) -> None:
    """What the sizes of the model rule out: targets, layouts, ways to rank its layers."""
    groups = VERBS[verb].groups
    if searches(cfg, verb):
        check_layout(arch, cfg.parallel, "the model's")
        check_candidates(cfg, arch)
    elif "target" in groups:
        target = wanted(cfg) if verb == "prune" else cfg.target
        pruned = target_arch(arch, target, cfg.parallel, exported=verb == "compress")
        if not cfg.target.sizes and pruned.num_layers == arch.num_layers:
            target = dataclasses.replace(target, layers_by="bi")  # a search was told how to rank layers, and chose to cut none
        check_smaller(arch, pruned, target)
        check_rounds(arch, pruned, target, cfg.parallel)
        check_ways(arch, pruned, target, cfg.calibrate.skip_lengths, cfg.calibrate.choices)
    elif "calibrate" in groups or verb == "train":
        check_layout(arch, cfg.parallel, "the model's")
    check_positions(arch, readings(cfg, verb), "the model")
    if measures_speed(cfg, verb):
        check_speed(cfg.speed, arch, cfg.device)
    if loads_teacher(cfg, verb) and cfg.teacher.path is None:
        check_teacher_layout(cfg, arch, "the model's")
    if verb == "cache" and cfg.teacher.cache.top_k >= arch.vocab_size:
        raise refuse("teacher.cache.top_k", cfg.teacher.cache.top_k, f"less than the vocabulary's {arch.vocab_size} is needed")
    if "calibrate" in groups and any(length >= arch.num_layers for length in cfg.calibrate.skip_lengths):
        raise refuse("calibrate.skip_layers", cfg.calibrate.skip_layers, f"fewer than the model's {arch.num_layers} layers are needed")
    if "distill" in groups and cfg.distill.top_k is not None and cfg.distill.top_k >= arch.vocab_size:
        raise refuse("distill.top_k", cfg.distill.top_k, f"fewer than the model's {arch.vocab_size} tokens are needed, or null for all")


def candidate_archs(cfg: Config, arch: Arch) -> list[Arch]:
    """The candidates' architectures, as far as they can be told before anything is measured: with search.latency_ms there may be fewer.

    Raises RequestError where there are none.
    """
    search = cfg.search
    if search.latency_ms is not None:
        search = dataclasses.replace(search, latency_ms=None, keep_dominated=True, max_candidates=sys.maxsize)
    found = find(arch, search, cfg.parallel, cfg.dtype).candidates
    return [target_arch(arch, candidate.target(cfg.target), cfg.parallel) for candidate in found]


def check_candidates(cfg: Config, arch: Arch) -> None:
    """Refuse budgets that nothing meets, and ways of cutting and of ranking layers that are no candidate's, or that calibration will not measure."""
    check_blocks(arch, cfg)
    shapes, target = candidate_archs(cfg, arch), cfg.target
    if target.merge_heads and all(shape.heads_per_group == arch.heads_per_group for shape in shapes):
        raise refuse("target.merge_heads", True, "no candidate loses query heads of a KV group; false is needed")
    depths = {shape.num_layers for shape in shapes} - {arch.num_layers}
    needed = {skipped_at_a_time(target.layers_by, arch.num_layers, depth) for depth in depths} if target.layers_by != "bi" else set()
    if missing := sorted(needed - {*cfg.calibrate.skip_lengths}):
        raise refuse("target.layers_by", target.layers_by, f"calibrate.skip_layers with {', '.join(map(str, missing))} is needed with it")
    if needed:
        check_questions(target, cfg.calibrate.choices)


def loads_teacher(cfg: Config, verb: str) -> bool:
    """Whether a verb runs the teacher itself: a distillation may read its cached predictions instead, speed has a process do it."""
    needless = cfg.teacher.cache.folder is not None or cfg.distill.loss == "none"
    return "teacher" in VERBS[verb].groups and verb != "speed" and not (needless and verb in ("search", "distill"))


def check_no_teacher(cfg: Config, verb: str) -> None:
    """distill.loss=none leaves nothing for a teacher to do; in `compress` evaluate still measures one."""
    needless = "must be null with distill.loss=none, which has no use for a teacher"
    if verb == "cache":
        raise refuse("distill.loss", "none", "there is no teacher whose predictions could be kept; minitron distill needs no cache then")
    if cfg.teacher.cache.folder is not None:
        raise refuse("teacher.cache.folder", cfg.teacher.cache.folder, needless)
    if verb in ("search", "distill") and cfg.teacher.path is not None:
        raise refuse("teacher.path", cfg.teacher.path, needless)


def check_teacher(cfg: Config, verb: str, student: Arch, teacher: Arch) -> None:
    """A teacher must know the student's tokens and, where it is loaded, fit the layout and know the positions that are read."""
    if teacher.vocab_size != student.vocab_size:
        raise RequestError(f"teacher.path={cfg.teacher.path}: vocabulary of {teacher.vocab_size}, the student's is {student.vocab_size}")
    if loads_teacher(cfg, verb):
        check_teacher_layout(cfg, teacher, "the teacher's")
        check_positions(teacher, (reading for reading in readings(cfg, verb) if reading.split != "calibration"), "the teacher")


def check_positions(arch: Arch, found: Iterable[Reading], whose: str) -> None:
    """Learned positions must be as many as are read at once: there are no others."""
    for reading in found if arch.learned_positions else ():
        if reading.seq_length > arch.max_position_embeddings:
            raise refuse(reading.length, reading.seq_length, f"{whose} has learned {arch.max_position_embeddings} positions and has no others")


def check_tokenizers(path: str, student: Path, teacher: Path) -> None:
    """A teacher must give the same numbers to the same tokens; a folder without a tokenizer says nothing of that and passes."""
    if not any((teacher / name).exists() for name in TOKENIZERS):
        return
    ours, theirs = load_tokenizer(str(student)), load_tokenizer(str(teacher), "teacher.path")
    if (token := differing_token(ours, theirs)) is not None:
        places = [tokenizer.get_vocab().get(token, "absent") for tokenizer in (theirs, ours)]
        raise refuse("teacher.path", path, f"its tokenizer differs: token {token!r} is {places[0]} there and {places[1]} in the student's")


def check_teacher_ranks(cfg: Config) -> None:
    """A layout of the teacher's own must go round the processes, as the student's."""
    layout, size = cfg.teacher_parallel, int(os.environ.get("WORLD_SIZE", "1"))
    ranks = layout.tp * layout.pp * layout.cp
    if layout != cfg.parallel and size % ranks:
        name = "tp" if layout.tp != cfg.parallel.tp else "pp"
        allowed = f"the teacher's tp x pp x parallel.cp = {ranks} must divide the number of processes, {size}"
        raise refuse(f"teacher.parallel.{name}", getattr(layout, name), allowed)
    check_expert_ranks(layout, size, "parallel" if layout == cfg.parallel else "teacher.parallel")


def check_teacher_layout(cfg: Config, teacher: Arch, whose: str) -> None:
    """The teacher must fit its own layout."""
    layout = cfg.teacher_parallel
    check_layout(teacher, layout, whose, "parallel" if layout == cfg.parallel else "teacher.parallel")


def check_hidden(cfg: Config, student: Arch, teacher: Arch) -> None:
    """Hidden states that are to be compared exist in both models, and their sizes agree or are bridged."""
    if cfg.distill.hidden.enabled:
        pairs_of(cfg.distill.hidden, student, teacher)


def check_texts(cfg: Config, verb: str, data: Manifest) -> None:
    """Refuse texts with too few tokens for what a verb reads of them, by their own names."""
    for reading in readings(cfg, verb):
        rows = data.splits[reading.split]
        there = [windows_in(data.parts[name].tokens, reading.seq_length) for name, _ in rows]
        if not any(there):
            setting, source, documents = text_of(cfg, reading.split)
            needed = f"one window of {reading.length}={reading.seq_length} needs {reading.seq_length + 1}"
            raise refuse(setting, source, f"too short: {documents} {data.num_tokens(reading.split)} tokens, and {needed}")
        taken(there, [weight for _, weight in rows], reading.seq_length, reading.limit_tokens, reading.windows, reading.amount)


def text_of(cfg: Config, split: str) -> tuple[str, str, str]:
    """The setting that a split's text comes from, its value, and what of it the split is, as the head of `... N tokens`."""
    if split.startswith("text_"):
        name = split.removeprefix("text_")
        return f"eval.texts.{name}", cfg.eval.texts[name], "it has"
    if (own := getattr(cfg.data, split)) is not None:
        return f"data.{split}", own, "it has"
    if split == "valid":
        return "data.train", cfg.data.train, f"its held-out documents (data.valid_fraction={cfg.data.valid_fraction}) have"
    if split == "calibration" and cfg.data.calibration_fraction is not None:
        return "data.train", cfg.data.train, f"its documents for calibration (data.calibration_fraction={cfg.data.calibration_fraction}) have"
    return "data.train", cfg.data.train, "it has"


def remarks(cfg: Config, verb: str, arch: Arch) -> Iterator[str]:
    """What is allowed but may be a slip, a line each."""
    lengths = {reading.length: reading.seq_length for reading in readings(cfg, verb)}
    long = [f"{name}={length}" for name, length in lengths.items() if length > arch.max_position_embeddings]
    if long and arch.rope_parameters["rope_type"] != "dynamic":  # the one kind that is made to go beyond
        yield f"{', '.join(long)}: longer than the {arch.max_position_embeddings} positions that the model knows (its max_position_embeddings)"
    there = Path(cfg.run.dir) / "cache"
    live = verb in ("distill", "compress") and cfg.teacher.cache.folder is None and not cfg.distill.hidden.enabled
    if live and loads_teacher(cfg, verb) and (there / MANIFEST).is_file():
        yield f"{there} holds a cache, which is not read: teacher.cache.folder={there} would read it in the teacher's place"


def training_remarks(cfg: Config, verb: str) -> Iterator[str]:
    """The same of a training, said when nothing is left to refuse it for."""
    steps, ends = (
        (cfg.search.rungs[-1], f"search.rungs={cfg.search.rungs}") if verb == "search" else (cfg.train.steps, f"train.steps={cfg.train.steps}")
    )
    if VERBS[verb].trains and cfg.train.warmup_steps >= steps:
        yield f"train.warmup_steps={cfg.train.warmup_steps}: shortened to {steps - 1}, as {ends} end before it does"
