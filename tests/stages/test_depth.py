"""Layers cut by what is missed without them, by commands: losses and answers measured, the block that is missed least gone."""

import itertools
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.stages.commands import minitron


@pytest.mark.slow
def test_the_block_that_the_answers_miss_least_is_cut(stories, tales, tmp_path):
    texts = [json.loads(line)["text"] for line in tales.read_text(encoding="utf-8").splitlines()][:12]
    questions = [{"context": text[:60], "choices": [text[60:90], other[60:90]], "answer": 0} for text, other in itertools.pairwise(texts)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    settings = [
        f"run.dir={tmp_path / 'run'}", f"model.path={stories}", f"data.train={tales}", "device=cpu", "dtype=fp32", "calibrate.samples=8",
        "calibrate.seq_length=32", "calibrate.skip_layers=[1,2]", f"calibrate.choices={tmp_path / 'questions.jsonl'}",
    ]  # fmt: skip
    done = minitron(tmp_path / "calibrate", "calibrate", *settings)
    assert done.code == 0, done.err
    scores = load_file(tmp_path / "run" / "importance.safetensors")
    assert {name: scores[name].shape for name in scores if name.startswith(("layers.loss", "layers.choices"))} == {
        "layers.loss.1": (5,), "layers.loss.2": (4,), "layers.choices.1": (5,), "layers.choices.2": (4,),
    }  # fmt: skip
    assert scores["layers.choices.1"].max() > 0.5  # the stories' own ends are likelier than others'
    cutting = [*settings[:2], *settings[3:], "target.layers_by=block_choices"]
    refused = minitron(tmp_path / "refused", "prune", *cutting, "target.num_layers=2")
    assert refused.code == 2 and "target.layers_by=block_choices: calibrate.skip_layers=3 is needed with it" in refused.err
    done = minitron(tmp_path / "prune", "prune", *cutting, "target.num_layers=3")
    assert done.code == 0, done.err
    gone = int(np.lexsort([scores["layers.loss.2"], -scores["layers.choices.2"]])[0])
    kept = load_file(tmp_path / "run" / "keep.safetensors")["layers"]
    assert kept.tolist() == [layer for layer in range(5) if layer not in (gone, gone + 1)]
    (tmp_path / "questions.jsonl").unlink()
    shutil.rmtree(tmp_path / "run" / "pruned")
    again = minitron(tmp_path / "rounds", "prune", *settings, "target.layers_by=loss", "target.num_layers=3", "target.rounds=2")
    assert again.code == 0, again.err  # measured again, not asked again
