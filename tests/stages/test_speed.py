"""`minitron speed`, and in the chain with speed.enabled: what it writes, when it is done again, what it leaves alone."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from tests.stages.commands import minitron

QUICK = ["speed.batch_sizes=[2]", "speed.prompt_lengths=[8]", "speed.new_tokens=3", "speed.repeats=2", "speed.threads=1"]


def written(run):
    return {name: (run / name).stat().st_mtime_ns for name in ("speed.json", "eval.json", "hf/README.md", "hf/model.safetensors")}


@pytest.mark.slow
def test_the_chain_measures_the_export_once_and_tells_it_everywhere(finished, settings, stories, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    command = ("compress", f"run.dir={run}", *settings, "speed.enabled=true", *QUICK)
    done = minitron(tmp_path / "first", *command)
    assert (done.code, done.err) == (0, "")
    assert "[7/8] speed" in done.out and "1 thread" in done.out and "2 x 8 + 3" in done.out
    sides = json.loads((run / "speed.json").read_text())["engines"]["transformers"]
    assert [*sides] == ["teacher", "student"]
    for name, folder in (("teacher", stories), ("student", run / "hf")):
        assert sides[name]["weights_bytes"] == 4 * AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        (load,) = sides[name]["loads"]
        assert len(load["first_seconds"]) == len(load["other_seconds"]) == 2 and load["peak_bytes"] > sides[name]["before_bytes"]
    assert "| 2 x 8 + 3 | teacher |" in ModelCard.load(run / "hf" / "README.md").text
    assert 'id="speed"' in (run / "report.html").read_text()

    before = written(run)
    assert minitron(tmp_path / "again", *command).code == 0
    assert written(run) == before
    done = minitron(
        tmp_path / "other", "speed", f"run.dir={run}", f"model.path={stories}", "device=cpu", "dtype=fp32", *QUICK[:-2], "speed.repeats=1"
    )
    assert (done.code, done.err) == (0, "")
    assert {name for name, time in written(run).items() if time != before[name]} == {"speed.json", "hf/README.md"}
    done = minitron(tmp_path / "export", "export", f"run.dir={run}", f"model.path={stories}", "device=cpu", "dtype=fp32")
    assert (done.code, done.err) == (0, "")
    assert json.loads((run / "stages.json").read_text())["speed"]["done"] is False


def test_a_run_without_an_export_is_refused(stories, tmp_path):
    done = minitron(tmp_path / "log", "speed", f"run.dir={tmp_path / 'run'}", f"model.path={stories}", "device=cpu", "dtype=fp32")
    assert done.code == 2 and done.err.endswith("hf/config.json is not there; minitron export makes it\n")
