"""The score file, and rankings that measure nothing."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron.arch.families import from_hf
from minitron.errors import RequestError
from minitron.importance.scores import Scores, expected_shapes, provenance, random_scores
from tests.oracles.models import config_of

ARCH = from_hf(config_of().to_dict(), "x")


@pytest.fixture
def written(tmp_path):
    scores = Scores(random_scores(ARCH, 3), provenance("cafe", "beef", {"samples": 12, "batch_agg": "l2"}, "0.1"))
    scores.save(tmp_path / "importance.safetensors")
    return tmp_path / "importance.safetensors"


def test_scores_come_back_with_their_provenance(written):
    scores = Scores.load(written, ARCH, "cafe")
    assert all(torch.equal(tensor, scores.tensors[name]) for name, tensor in random_scores(ARCH, 3).items())
    assert scores.provenance == {"model_hash": "cafe", "data_hash": "beef", "version": "0.1", "samples": "12", "batch_agg": "l2"}


def test_scores_of_another_model_are_refused(written):
    with pytest.raises(RequestError, match=r"importance.safetensors was measured on another model \(hash cafe, this one is f00d\)"):
        Scores.load(written, ARCH, "f00d")
    with pytest.raises(RequestError, match="its tensors do not fit the model's sizes"):
        Scores.load(written, ARCH.replace(num_layers=5), "cafe")


def test_what_was_measured_without_layers_is_told_by_how_many(tmp_path):
    file, layers = tmp_path / "importance.safetensors", ARCH.num_layers
    runs = {f"layers.{kind}.{length}": torch.rand(layers - length + 1) for kind in ("loss", "choices") for length in (1, 3)}
    Scores({**random_scores(ARCH, 3), **runs}, {"model_hash": "cafe"}).save(file)
    assert Scores.load(file, ARCH, "cafe").tensors.keys() == {*expected_shapes(ARCH), *runs}
    # as it was written before several lengths could be measured
    Scores({**random_scores(ARCH, 3), "layers.loss": runs["layers.loss.3"]}, {"model_hash": "cafe"}).save(file)
    assert torch.equal(Scores.load(file, ARCH, "cafe").tensors["layers.loss.3"], runs["layers.loss.3"])
    for wrong in ({"layers.loss.2": torch.rand(layers)}, {"layers.loss": torch.rand(layers + 1)}, {"layers.spare": torch.rand(3)}):
        Scores({**random_scores(ARCH, 3), **wrong}, {"model_hash": "cafe"}).save(file)
        with pytest.raises(RequestError, match="its tensors do not fit the model's sizes"):
            Scores.load(file, ARCH, "cafe")


def test_files_that_are_no_score_files_are_refused(written, tmp_path):
    with pytest.raises(RequestError, match=r"cannot read .*absent.*minitron calibrate makes it"):
        Scores.load(tmp_path / "absent", ARCH, "cafe")
    written.write_bytes(written.read_bytes()[:-4])
    with pytest.raises(RequestError, match=r"cannot read .*importance.safetensors"):
        Scores.load(written, ARCH, "cafe")
    save_file(load_file(_foreign(tmp_path)), tmp_path / "plain.safetensors")
    with pytest.raises(RequestError, match="was measured on another model"):
        Scores.load(tmp_path / "plain.safetensors", ARCH, "cafe")


def _foreign(folder):
    save_file({"hidden": torch.zeros(3)}, folder / "foreign.safetensors")
    return folder / "foreign.safetensors"


def test_random_scores_are_those_of_their_seed():
    first, again, other = (random_scores(ARCH, seed) for seed in (7, 7, 8))
    assert {name: tuple(score.shape) for name, score in first.items()} == expected_shapes(ARCH)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["ffn.0"], first["ffn.1"])
