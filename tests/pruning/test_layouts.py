"""From activations to the pruned model, at every layout: `transformers`' scores, brute force's tensors."""

import pytest

from tests.oracles.exact import LAYOUTS, compared, make_model, oracle_scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def oracle(folder):
    return oracle_scores(folder)


@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_axis_at_every_layout(layout, folder, oracle, tmp_path):
    row = compared(layout, folder, tmp_path, oracle)
    assert row["kept ≠"] == row["tensors ≠"] == 0
    assert row["logits"] < 1e-4
    errors = {axis: row[axis] for axis in ("hidden", "ffn", "heads", "groups", "layers.bi", "layers.loss")}
    assert all(error < 1e-5 for error in errors.values()), errors
