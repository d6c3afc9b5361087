"""Commands of the documents as they stand, executed: on a model of 260 thousand parameters, for two steps, with sizes that it has."""

import functools
import os
import shutil

import pytest

from minitron.cli import main
from minitron.config.compose import compose
from minitron.config.verbs import VERBS
from minitron.stages import submit
from tests.docs.blocks import blocks, commands
from tests.stages.commands import minitron

pytestmark = pytest.mark.slow

SMALL = [
    "data.text_key=text", "calibrate.samples=8", "calibrate.seq_length=32", "calibrate.skip_samples=4", "train.steps=2", "train.global_batch_size=4",
    "train.micro_batch_size=4", "train.seq_length=32", "train.eval_interval=2", "train.eval_tokens=256", "train.save_interval=2",
    "train.warmup_steps=1", "eval.tokens=256", "logging.progress=false", "device=cpu", "dtype=fp32",
]  # fmt: skip
BUDGET = [
    "search.params=215e3", "search.ffn_hidden_size=[112,120,128]", "search.num_layers=[5]", "search.keep_dominated=true", "search.rungs=[1,2]",
    "search.finalists=2", "search.tokens=256",
]  # fmt: skip
SIZES = {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}  # for those of other models
# what a block is known by -> files that it leaves; the run that a block of Python reads, and what that block is known by
EXECUTED = {
    "run.dir=runs/mine": (["runs/mine/report.html"], ("runs/mine", "smollm2_135m_to_100m/hf")),
    "minitron compress model.path=MODEL search.params=4e9": (["runs/4b/candidates.json", "runs/4b/hf/model.safetensors"], None),
    "run.dir=runs/c ": (["runs/a/eval.json", "runs/b/eval.json", "runs/c/eval.json"], None),
    "run.dir=runs/corrected": (["runs/corrected/hf/model.safetensors", "runs/a/eval.json"], None),
    "run.dir=runs/by_$criterion": (["runs/by_magnitude/hf", "runs/by_random/eval.json"], ("runs/by_activation", "by_activation/importance")),
    "cp -r runs/pruned": (["runs/jsd/eval.json", "runs/reverse_kl/checkpoints"], None),
}


def small(words, stories, tales):
    """The words of a command with the settings that make it short."""
    _, verb, *settings = words
    cfg = compose(verb, settings, complete=False)
    sizes = [f"target.{axis}={SIZES[axis]}" for axis, size in cfg.target.sizes.items() if type(size) is int]
    own = "" if cfg.model.path.endswith("corrected/hf") else f"model.path={stories}"
    source = "" if VERBS[verb].groups == ("run",) else f"data.train={tales}"
    return [word for word in (verb, *settings, own, source, *SMALL, *sizes, *(BUDGET if cfg.search.budgets else [])) if word]


def execute(words, folder, stories, tales, number):
    if words[0] == "cp":
        assert words[1] == "-r"
        shutil.copytree(folder / words[2], folder / words[3])
        return
    done = minitron(folder / f"command{number}", *small(words, stories, tales), prepare=functools.partial(os.chdir, folder))
    assert done.code == 0, f"{' '.join(words)}\n{done.out}\n{done.err}"


def block_with(mark, language=""):
    (block,) = [block for block in blocks(language) if mark in block.text]
    return block


@pytest.mark.parametrize("mark", EXECUTED)
def test_a_block_does_what_it_says(mark, stories, tales, tmp_path, monkeypatch, capsys):
    left, reader = EXECUTED[mark]
    (tmp_path / "shell").mkdir()
    for number, words in enumerate(commands(block_with(mark).text, tmp_path / "shell")):
        if words[1] != "plan":
            execute(words, tmp_path, stories, tales, number)
    assert all((tmp_path / name).exists() for name in left)
    if reader is not None:
        run, mark = reader
        block = block_with(mark, "python")
        monkeypatch.chdir(tmp_path)
        if not (tmp_path / "runs" / mark.split("/")[0]).exists():
            (tmp_path / run).rename(tmp_path / "runs" / mark.split("/")[0])
        exec(compile(block.text, str(block), "exec"), {})
        assert capsys.readouterr().out.strip()


def asked(folder):
    """The commands that only say something: plans of models whose sizes are known, submissions."""
    for number, block in enumerate(blocks("")):
        (folder / str(number)).mkdir()
        for words in commands(block.text, folder / str(number)):
            if words[0].endswith("minitron") and words[1] in ("plan", "submit") and not any(word.startswith("model.path=") for word in words):
                yield words


def test_plans_and_scripts_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(submit, "look_at_cluster", lambda jobs, dry: None)  # a cluster that there is has other partitions
    # a recipe of one's own, and a folder that all nodes see
    found = [[word.replace(",mine", "").replace("run.dir=/shared/", f"run.dir={tmp_path}/") for word in words[1:]] for words in asked(tmp_path)]
    assert {words[0] for words in found} == {"plan", "submit"}
    for words in found:
        code = main([*words, *(["--dry-run", "slurm.check=false"] if words[0] == "submit" else [])])
        printed = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}: {printed.err}"
        assert ("#SBATCH" if words[0] == "submit" else "params") in printed.out
