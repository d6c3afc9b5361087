"""Every command of the documents is one that works: composed and checked by the product itself, without anything being computed.

What a command needs that is not here, as a model, a text, a cluster, is put in its place by the tables below; what can be executed is, in
test_commands_run.py. A command that none of the programs' entries takes fails.
"""

import argparse
import ast
import dataclasses
import importlib
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from minitron.arch.families import from_hf
from minitron.checks import check
from minitron.config.compose import compose
from minitron.config.layout import check_layout
from minitron.config.verbs import VERBS
from minitron.errors import RequestError
from minitron.stages import family, plan, submit
from tests.docs.blocks import ROOT, blocks, commands, every_block
from tests.stages.commands import write_tales

TEXTS = {"TEXT", "texts.jsonl", "my.jsonl", "/data/my.jsonl", "novel.txt"}  # what stands in the documents for a text of one's own
QUESTIONS = {"allenai/winogrande:winogrande_xl"}  # what the hub would be asked for
RECORD = '{"sentence": "The dog chased the cat as _ ran.", "option1": "the dog", "option2": "the cat", "answer": "2"}\n'
MODELS = {"MODEL", "my_model", "runs/corrected/hf"}  # of one's own: SmolLM2's sizes stand for theirs, Llama-3.1-8B's where billions are asked for
RANKS = 8  # processes that launch/local.sh starts where the documents have a machine of eight GPUs


def sizes_of(**given):
    return from_hf({"model_type": "llama", "rms_norm_eps": 1e-5, **given}, "model.shape")


SMOLLM2 = sizes_of(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
    max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
LLAMA31_8B = sizes_of(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Files for what the documents only name."""
    folder = tmp_path_factory.mktemp("things")
    write_tales(folder / "text.jsonl")
    (folder / "text.txt").write_text("once there was a little dog\n" * 100)
    (folder / "questions.jsonl").write_text(RECORD)
    return {**{name: folder / f"text{Path(name).suffix or '.jsonl'}" for name in TEXTS}, **dict.fromkeys(QUESTIONS, folder / "questions.jsonl")}


def in_place(words, things):
    """The words with files that exist for those that are only named."""
    found = []
    for word in words:
        key, separator, value = word.partition("=")
        found.append(f"{key}={things[value]}" if separator and value in things else word)
    return found


def arch_of(cfg):
    """The sizes of the model that a command names, without a hub."""
    if cfg.model.shape:
        return from_hf(dict(cfg.model.shape), "model.shape")
    assert cfg.model.path in MODELS or "SmolLM2" in cfg.model.path, f"what does model.path={cfg.model.path} stand for?"
    return LLAMA31_8B if (cfg.search.params or 0) > 1e9 else SMOLLM2


def composed(words, things, ranks=1):
    """`minitron WORDS`: what it composes to is what the verb can do with so many processes."""
    verb, *overrides = in_place(words, things)
    cfg = compose(verb, overrides)
    if "parallel" in VERBS[verb].groups and verb != "plan":
        check_layout(cfg.parallel, ranks)
    if verb == "plan":
        plan.planned(arch_of(cfg), dataclasses.replace(cfg, plan=dataclasses.replace(cfg.plan, layouts=0)))
    elif verb == "family":
        plan.planned(arch_of(cfg), dataclasses.replace(cfg, plan=dataclasses.replace(cfg.plan, layouts=0)))
        for name, text in cfg.family.steps.items():
            check_layout(family.settings_of(cfg, name, shlex.split(text)).parallel, ranks)
    elif not (verb == "prune" and not cfg.target.sizes):  # what a search chose there
        looked_at(cfg, verb, ranks)


def looked_at(cfg, verb, ranks):
    """What the verb refuses for before a process group is made; a cache is there by then."""
    if verb != "cache":
        cfg = dataclasses.replace(cfg, teacher=dataclasses.replace(cfg.teacher, cache=dataclasses.replace(cfg.teacher.cache, folder=None)))
    with submit.processes(ranks):
        check(cfg, verb, to_come=True, arch=arch_of(cfg) if "model" in VERBS[verb].groups else None)


def minitron(words, things):
    if words[1] == "submit":
        return submitted(words[2:], things)
    flags = [word for word in words if word.startswith("--")]
    assert set(flags) <= {"--help", "--cfg"}
    return composed([word for word in words[1:] if word not in flags], things)


def submitted(words, things):
    """`minitron submit VERB ...`: each job of each run, with the processes that it will have."""
    flags = {word for word in words if word.startswith("--")}
    assert flags <= {flag for flag, _ in VERBS["submit"].flags}
    verb, *overrides = in_place([word for word in words if word not in flags], things)
    overrides = [word.replace(",mine", "") for word in overrides]  # a recipe of one's own
    _, parts = submit.sweep(verb, overrides) if "--sweep" in flags else submit.single(verb, overrides)
    for part in parts:
        for cfg, _ in submit.steps(verb, part).values():
            check_layout(cfg.parallel, cfg.slurm.world_size)
            looked_at(cfg, verb, cfg.slurm.world_size)


def make(words, things):
    """The target is one of the Makefile's; the recipe and the settings are the demo's."""
    _, target, *variables = words
    listed = subprocess.run(["make", "-n", target, *variables], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    given = dict(variable.split("=", 1) for variable in variables)
    if target == "demo":
        settings = given.get("ARGS", "").replace("'", "").split()
        composed(
            ["compress", f"recipe={given.get('RECIPE', 'smollm2_135m_to_100m')}", *in_place(settings, {**things, "FILE.txt": things["novel.txt"]})],
            things,
        )


class Parsed(Exception):
    """The options were understood."""


def benchmark(words, things, monkeypatch):
    """The script's own parser takes the options, and what is a setting of minitron's is one."""
    if words[1:3] == ["-m", "pip"]:
        return  # asks a package index
    if words[1] == "-m":
        assert words[2].startswith("benchmarks.")
        name, options = words[2], words[3:]
        name += ".__main__" * (ROOT / name.replace(".", "/")).is_dir()
    else:
        script, options = ROOT / words[1], words[2:]
        assert script.is_file() and script.parent.name == "benchmarks"
        monkeypatch.syspath_prepend(str(script.parent))
        name = script.stem
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *_):
        raise Parsed(parse(self, options))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(name).main()
    given = vars(parsed.value.args[0])
    if settings := [*given.get("overrides", []), *given.get("settings", []), *given.get("set", [])]:
        compose("compress", settings, complete=False)
    if given.get("json"):
        assert str(given["json"]).startswith("docs/results/")


def torchrun(words, things):
    _, *options = words[: words.index("-m")]
    size = next(int(option.partition("=")[2]) for option in options if option.startswith("--nproc-per-node="))
    assert words[words.index("-m") + 1] == "minitron"
    composed(words[words.index("-m") + 2 :], things, size)


def local(words, things):
    numbered = words[1].isdecimal()
    composed(words[1 + numbered :], things, int(words[1]) if numbered else RANKS)


def container(words, things):
    """What needs docker, enroot or a cluster is not run; the command inside is looked at."""
    if "torchrun" in words:
        torchrun(words[words.index("torchrun") :], things)


def nothing(words, things):
    """A shell's own work on files."""


# program -> what looks at its commands
PROGRAMS = {
    "minitron": minitron, ".venv/bin/minitron": minitron, ".venv/bin/python": benchmark, "python": benchmark, "make": make, "torchrun": torchrun,
    "launch/local.sh": local, "docker": container, "enroot": container, "srun": container, "apptainer": container, "cp": nothing, "id": nothing,
}  # fmt: skip


def looks(words, things, monkeypatch):
    assert words[0] in PROGRAMS, f"no entry of PROGRAMS takes {words[0]}: {' '.join(words)}"
    take = PROGRAMS[words[0]]
    take(words, things, monkeypatch) if take is benchmark else take(words, things)


@pytest.mark.parametrize("block", blocks("", "bash", "sh"), ids=str)
def test_commands_of_a_block(block, things, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = commands(block.text, tmp_path)
    assert found, "a block without a command"
    for words in found:
        try:
            looks(words, things, monkeypatch)
        except (AssertionError, RequestError, SystemExit) as error:
            raise AssertionError(f"{block}: {' '.join(words)}: {error}") from error


def test_what_nothing_takes_fails(things, tmp_path, monkeypatch):
    """A program without an entry, a setting that there is not, a target, an option: each is seen."""
    wrong = (
        "rsync -a runs elsewhere",
        "minitron compress recipe=smollm2_135m_to_100m train.stepz=3",
        "minitron compress recipe=llama31_8b_to_4b data.train=my.jsonl",  # eight GPUs, one process
        "minitron compress recipe=smollm2_135m_to_100m data.train=nowhere.jsonl",
        "make demolish",
        "make demo RECIPE=nothing",
        ".venv/bin/python benchmarks/criteria.py --jsn out.json",
    )
    for number, text in enumerate(wrong):
        (words,) = commands(text, tmp_path / str(number))
        with pytest.raises((AssertionError, RequestError, SystemExit)):
            looks(words, things, monkeypatch)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_of_a_block_can_be_read_and_its_names_are_there(block):
    compile(block.text, str(block), "exec")
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_of_a_block_can_be_read(block):
    assert isinstance(yaml.safe_load(block.text), dict)


def test_blocks_are_in_languages_that_are_looked_at():
    assert {block.language for block in every_block()} <= {"", "bash", "sh", "python", "yaml"}
