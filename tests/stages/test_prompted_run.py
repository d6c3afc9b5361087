"""A run on prompts and answers, packed whole and kept apart: what it leaves, and that it goes on where it was stopped."""

import json
import shutil

import numpy as np
import pytest

from minitron.data.manifest import Manifest
from tests.oracles.metrics import without_costs
from tests.stages.commands import minitron

ASKED = ["data.prompt_key=question", "data.packing=documents", "data.separate_documents=true", "train.steps=4", "train.save_interval=2"]
REST = ("target", "calibrate", "eval")  # groups of settings that distill does not read


@pytest.fixture(scope="module")
def usual(settings, tales, tmp_path_factory):
    """Settings of a small run on the tales, the first words of each being a prompt."""
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    texts = [json.loads(line)["text"] for line in tales.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({"question": text[:60], "text": text[60:]}) + "\n" for text in texts))
    changed = {setting.split("=")[0] for setting in [*ASKED, "data.train"]}
    return [*(setting for setting in settings if setting.split("=")[0] not in changed), f"data.train={path}", *ASKED]


def lines(run):
    """The metrics of a run, without those that tell time."""
    with open(run / "metrics.jsonl", encoding="utf-8") as handle:
        return without_costs(map(json.loads, handle))


def test_a_prompted_run_is_made_stopped_and_continued(usual, tmp_path):
    run = tmp_path / "run"
    done = minitron(tmp_path / "whole", "compress", f"run.dir={run}", *usual)
    assert (done.code, done.err) == (0, ""), done
    (prefix, _), *_ = Manifest.load(run / "data").blend("train")
    assert np.fromfile(f"{prefix}.prompts", "<i4").min() > 0
    whole = lines(run)
    assert [line["tokens"] for line in whole] == [512 * step for step in range(1, 5)]
    assert all(0 < line["counted_tokens"] < 512 for line in whole)

    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (run / "checkpoints" / "latest").write_text("2\n")
    record = json.loads((run / "stages.json").read_text())
    record["distill"]["done"] = False
    (run / "stages.json").write_text(json.dumps(record))
    done = minitron(tmp_path / "rest", "distill", f"run.dir={run}", *[setting for setting in usual if setting.split(".")[0] not in REST])
    assert (done.code, done.err) == (0, ""), done
    assert "2 of 4 steps were done before: goes on from there" in done.out
    assert lines(run) == whole

    done = minitron(tmp_path / "other", "compress", f"run.dir={run}", *[value for value in usual if "packing" not in value])
    assert (
        done.code == 2
        and done.err.startswith("minitron: data.packing=stream: run.dir=")
        and "whose distill was made with data.packing=documents" in done.err
    )
