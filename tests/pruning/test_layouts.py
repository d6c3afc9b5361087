"""From activations to the pruned model, at every layout: `transformers`' scores, brute force's tensors."""

import pytest

from tests.multirank.ranks import Layout
from tests.oracles.exact import LAYOUTS, compared, make_model, oracle_scores
from tests.oracles.models import BIASES, NEMOTRON

MODELS = {"llama": {}, "nemotron": {**NEMOTRON, **BIASES}}
RUNS = [("llama", layout) for layout in LAYOUTS]
RUNS += [("nemotron", layout) for layout in (Layout(tp=2, sp=True), Layout(pp=2), Layout(tp=2, pp=2))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make_model(tmp_path_factory.mktemp(name) / "model", **changes) for name, changes in MODELS.items()}


@pytest.fixture(scope="module")
def oracles(folders):
    return {name: oracle_scores(folder) for name, folder in folders.items()}


@pytest.mark.multirank
@pytest.mark.parametrize(("model", "layout"), RUNS, ids=str)
def test_every_axis_at_every_layout(model, layout, folders, oracles, tmp_path):
    row = compared(layout, folders[model], tmp_path, oracles[model])
    assert row["kept ≠"] == row["tensors ≠"] == 0
    assert row["logits"] < 1e-4
    errors = {axis: row[axis] for axis in ("hidden", "ffn", "heads", "groups", "layers.bi", "layers.loss")}
    assert all(error < 1e-5 for error in errors.values()), errors
