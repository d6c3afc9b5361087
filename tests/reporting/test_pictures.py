"""What the pictures are drawn from, against counts and sums made another way; and that their SVG is sound."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from minitron.arch import Arch
from minitron.arch.arch import Layer
from minitron.reporting import curves, pictures
from minitron.reporting.drawing import COLORS, boxes, draw
from minitron.reporting.report import loss_told
from minitron.reporting.runfiles import read_run
from tests.reporting.conftest import write_parts

SMOLLM2 = Arch("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, share_embeddings_and_output_weights=True)


def every_picture(run):
    return [
        pictures.parameter_bars(run.original, run.pruned),
        pictures.blueprint(run.original, run.pruned, run.keep),
        *pictures.importance_pictures(run.importance, run.keep, "activation"),
        curves.train_curve(run.metrics),
        curves.validation_curve(run.metrics, run.evals),
        curves.loss_dots(run.evals),
    ]


def test_parts_add_up_to_the_model():
    attention = 30 * (576 * (9 + 3 + 3) * 64 + 9 * 64 * 576 + 576)
    assert pictures.part_parameters(SMOLLM2) == {
        "embedding and head": 49152 * 576 + 576,
        "attention": attention,
        "MLP": 30 * (3 * 576 * 1536 + 576),
    }
    assert sum(pictures.part_parameters(SMOLLM2).values()) == 134515008  # as the model's card says


def test_layers_with_sizes_of_their_own_are_counted_and_told_one_by_one(every_axis_run_dir):
    blocks = tuple(Layer(12 + layer, 9 - 3 * (layer % 2), 3) for layer in range(30))
    uneven = SMOLLM2.replace(ffn_hidden_size=41, layers=blocks)
    assert pictures.part_parameters(uneven)["MLP"] == sum(3 * 576 * block.ffn_hidden_size + 576 for block in blocks)
    assert sum(pictures.part_parameters(uneven).values()) == uneven.num_parameters()
    svg = pictures.blueprint(SMOLLM2, uneven, read_run(every_axis_run_dir).keep).svg
    assert ">1,536 → 12..41</text>" in svg and ">9 → 6..9</text>" in svg and ">576, all kept</text>" in svg


def test_every_picture_is_sound_svg_in_the_colours_of_the_page(every_axis_run_dir):
    for picture in every_picture(read_run(every_axis_run_dir)):
        root = ElementTree.fromstring(picture.svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox").startswith("0 0 400 ")
        assert not re.search(r"(fill|stroke)[:=]\s*\"?#", picture.svg), f"{picture.title}: a colour that the dark page does not change"
        assert set(re.findall(r"var\(--(\w+)\)", picture.svg)) <= set(COLORS)
        assert "font-family" not in picture.svg and "<style" not in picture.svg and "<image" not in picture.svg


def test_pictures_are_the_same_every_time(run_dir):
    run = read_run(run_dir)
    assert pictures.hidden_curve(run.importance["hidden"], run.keep["hidden"]) == pictures.hidden_curve(run.importance["hidden"], run.keep["hidden"])


def test_which_pictures_there_are_depends_on_what_was_pruned(run_dir, every_axis_run_dir):
    def titles(folder):
        run = read_run(folder)
        return [picture.title for picture in pictures.importance_pictures(run.importance, run.keep)]

    assert titles(run_dir) == ["Hidden channels", "Layers", "Scores by layer", "MLP neurons", "Attention heads"]
    assert titles(every_axis_run_dir) == ["Hidden channels", "Layers", "Scores by layer", "MLP neurons", "Attention heads", "KV groups"]


@pytest.mark.parametrize("most", [25.0, 900.0, 1e6])
def test_figures_of_a_log_axis_are_plain_and_several(most):
    svg = pictures.hidden_curve(np.geomspace(30.0, 30.0 * most, 64), None).svg
    figures = re.findall(r"<text[^>]*>([0-9][^<]*)</text>", svg.split("score (log)")[0].split("channel, by rank")[1])
    assert len(figures) >= 3 and all(float(figure) >= 24 for figure in figures) and "math" not in svg


def test_scores_by_layer_are_told_against_their_mean(every_axis_run_dir):
    run = read_run(every_axis_run_dir)
    means = [run.importance[f"ffn.{layer}"].mean() for layer in range(30)]
    assert np.allclose(pictures.layer_means(run.importance, "ffn"), means) and len(pictures.layer_means(run.importance, "experts")) == 0
    picture = pictures.score_by_layer({"ffn": np.array([1.0, 2.0, 0.0, 9.0])}, np.array([0, 3]))
    assert picture.caption.endswith("Hatched, dropped: 1, 2.") and ">MLP neurons</text>" in picture.svg
    ElementTree.fromstring(pictures.score_by_layer({"heads": np.zeros(4)}, None).svg)  # nothing has no place on a log axis


def losses_of(layers, at_a_time):
    """A loss for every run of layers, the lowest without the run that starts at layer 4."""
    return np.array([3.0 + 0.1 * abs(first - 4) for first in range(layers - at_a_time + 1)], dtype=np.float32)


def test_losses_without_layers_stand_beside_the_layers_scores(run_dir):
    run = read_run(run_dir)
    found = pictures.importance_pictures({**run.importance, "layers.loss.1": losses_of(30, 1)}, run.keep, "activation")
    assert [picture.title for picture in found[:3]] == ["Layers", "Loss without a layer", "Hidden channels"]
    assert found[1].caption == "Next-token loss without a layer; the lowest, 3.000, without layer 4."
    both = {**run.importance, "layers.choices.8": 1 / losses_of(30, 8), "layers.loss.1": losses_of(30, 1), "layers.loss.8": losses_of(30, 8)}
    several = pictures.importance_pictures(both, run.keep, "activation")
    assert [picture.title for picture in several[1:4]] == [
        "Loss without a layer",
        "Answers without 8 layers in a row",
        "Loss without 8 layers in a row",
    ]
    assert several[2].caption == "Share of questions answered rightly without 8 layers in a row; the highest, 0.333, without layers 4 to 11."
    without_keep = pictures.importance_pictures({**run.importance, "layers.loss.1": losses_of(30, 1)}, None)
    assert without_keep[1].caption == found[1].caption


@pytest.mark.parametrize(("at_a_time", "dropped", "crosses"), [(1, [4, 9], 2), (8, list(range(4, 12)), 1), (8, [0, 3, 5], 0), (3, [4, 5, 6, 7], 2)])
def test_every_run_of_layers_that_was_dropped_whole_is_a_cross(at_a_time, dropped, crosses):
    losses = losses_of(30, at_a_time).astype(float)
    picture = pictures.without_layers("layers.loss", losses, 30, np.setdiff1d(np.arange(30), dropped))
    marks = {colour: len(re.findall(rf"<use[^>]*var\(--{colour}\)", picture.svg)) for colour in ("kept", "cut")}
    assert marks == {"kept": len(losses) - crosses, "cut": crosses}
    assert ("Cross: dropped." in picture.caption) == bool(crosses)
    assert "without layer" in picture.caption if at_a_time == 1 else f"without layers 4 to {3 + at_a_time}" in picture.caption


@pytest.mark.parametrize("losses", [[np.nan, 3.0, np.inf], [np.nan] * 3])
def test_losses_without_layers_that_are_not_finite_can_be_drawn(losses):
    picture = pictures.without_layers("layers.loss", np.array(losses), 4, None)
    ElementTree.fromstring(picture.svg)
    assert ("the lowest, 3.000, without layers 1 to 2" in picture.caption) == (losses[1] == 3.0)


def test_captions_tell_what_was_cut(every_axis_run_dir):
    run = read_run(every_axis_run_dir)
    captions = {picture.title: picture.caption for picture in every_picture(run)}
    dropped = sorted(set(range(30)) - set(run.keep["layers"].tolist()))
    assert len(dropped) == 4 and f"dropped: {', '.join(map(str, dropped))}." in captions["Layers"]
    assert "4 of 30 layers dropped" in captions["Blueprint"]
    scores = np.sort(run.importance["hidden"])[::-1]
    assert f"{100 * scores[:512].sum() / scores.sum():.1f} %" in captions["Hidden channels"]
    assert "the cut after 1,152." in captions["MLP neurons"]
    assert "39.3 M tokens and 1,200 steps. Skipped steps: 1." in captions["Distillation loss"]


def test_every_kept_head_has_a_dot_and_every_cut_one_a_cross(every_axis_run_dir):
    run = read_run(every_axis_run_dir)
    picture = next(picture for picture in pictures.importance_pictures(run.importance, run.keep) if picture.title == "Attention heads")
    kept = 26 * 4
    crosses = 2 * (26 * 9 - kept)  # each with a rim
    assert picture.svg.count("<use") == kept + crosses


def test_boxes_cover_what_they_are_told():
    patch = boxes(np.array([[0, 0, 2, 1], [3, 1, 1, 0.5]]), "#000000")
    corners = patch.get_path().vertices.reshape(-1, 5, 2)
    assert corners.min(axis=1).tolist() == [[0, 0], [3, 1]] and corners.max(axis=1).tolist() == [[2, 1], [4, 1.5]]


def test_series_leave_out_what_is_not_a_number():
    metrics = [
        {"step": 1, "tokens": 10, "loss": 2.0},
        {"step": 2, "tokens": 20, "loss": None},
        {"step": 3, "tokens": 30},
        {"step": 4, "tokens": 40, "loss": 1.0},
    ]
    tokens, loss = curves.series(metrics, "loss")
    assert tokens.tolist() == [10, 40] and loss.tolist() == [2.0, 1.0]
    assert curves.series([], "loss")[0].tolist() == []


@pytest.mark.parametrize("length", [1, 7, 39, 40, 1000])
def test_smoothing_keeps_lines_straight_and_thinning_keeps_the_mean(length):
    line = np.linspace(5, 1, length)
    assert np.allclose(curves.smooth(line), line)
    noise = np.random.default_rng(0).normal(size=length)
    x, y = curves.thin(np.arange(length, dtype=float), noise, points=length)
    assert np.array_equal(y, noise) and np.array_equal(x, np.arange(length))
    assert len(curves.thin(x, noise, points=8)[1]) == min(length, 8)
    if length == 1000:
        assert np.isclose(curves.thin(x, noise, points=8)[1].mean(), noise.mean()) and np.var(curves.smooth(noise)) < 0.1 * np.var(noise)


def test_relative_scores_compare_within_a_layer():
    values, _, _ = pictures.relative(np.array([[1.0, 2.0, 3.0], [100.0, 200.0, 300.0]]))
    assert np.allclose(values[0], values[1]) and values[0, 1] == 0


@pytest.mark.parametrize("scores", [np.zeros((2, 4)), np.ones((1, 1)), np.array([[0.0, 5.0]])])
def test_scores_without_spread_can_be_drawn(scores):
    for axis in ("heads", "groups"):
        ElementTree.fromstring(pictures.heads_map(axis, scores, None).svg)
    ElementTree.fromstring(pictures.ffn_map("ffn", scores, None).svg)
    ElementTree.fromstring(pictures.hidden_curve(scores[0], None).svg)


def test_training_without_teacher_or_evaluation_is_drawn():
    metrics = [{"step": step, "tokens": step * 10, "loss": 3.0 / step, "valid_loss": 2.0} for step in (1, 2, 3)]
    picture = curves.train_curve(metrics)
    assert picture.title == "Training loss" and picture.caption.startswith("From 3.000 to 1.000 over 30 tokens and 3 steps.")
    assert "pruned" not in curves.validation_curve(metrics, {}).svg
    assert curves.train_curve([{"step": 1}]) is None and curves.validation_curve([{"step": 1}], {}) is None


def test_what_is_told_and_drawn_is_the_loss_that_is_minimised(run_dir):
    """Where the total falls and kd_loss rises, a fall is told; each part has a line, and the axis the name of the quantity."""
    write_parts(run_dir, steps=12)
    run = read_run(run_dir)
    picture = curves.train_curve(run.metrics, *loss_told(run))
    first, last = (f"{line['loss']:.3f}" for line in (run.metrics[0], run.metrics[-1]))
    assert picture.caption == (
        f"From {first} to {last} over 98.3 K tokens and 12 steps. loss = kd_loss + 0.5 × ce_loss + 2 × hidden_loss; kd_loss: Jensen-Shannon "
        "divergence; beta 0.3; temperature 2, scaled by its square; the teacher's 64 largest tokens and all others together."
    )
    assert float(first) > float(last)
    texts = re.findall(r"<text[^>]*>([^<]+)<", picture.svg)
    assert {"loss", "kd_loss", "ce_loss", "hidden", "lr"} <= set(texts)
    assert "smoothed" not in texts and "validation" not in texts  # too few steps; and held-out next-token loss is another quantity


@pytest.mark.parametrize(
    ("distill", "label", "said"),
    [
        ("loss: forward_kl", "KL(teacher ‖ student)", "KL(teacher ‖ student)."),
        ("loss: reverse_kl, temperature: 0.5", "KL(student ‖ teacher)", "KL(student ‖ teacher); temperature 0.5, scaled by its square."),
        ("loss: jsd, beta: 0.25", "Jensen-Shannon divergence", "Jensen-Shannon divergence; beta 0.25."),
        ("top_k: null", "loss", ""),
    ],
)
def test_the_axis_says_which_loss_it_is(run_dir, distill, label, said):
    (run_dir / "config.yaml").write_text(f"distill: {{{distill}}}\n")
    run = read_run(run_dir)
    assert loss_told(run) == (label, said)
    picture = curves.train_curve(run.metrics, label, said)
    assert f">{label} (nats)<" in picture.svg and picture.caption.endswith(f"steps: 1. {said}".strip())


def test_a_cached_teacher_is_told(run_dir):
    (run_dir / "config.yaml").write_text("distill: {loss: forward_kl}\nteacher: {cache: {folder: c, top_k: 32}}\n")
    assert loss_told(read_run(run_dir))[1] == "KL(teacher ‖ student); the teacher's 32 largest tokens and all others together; a cached teacher."


def test_losses_that_are_not_finite_can_be_drawn():
    evals = json.loads('{"teacher": {"loss": 2.0}, "pruned": {"loss": Infinity}, "student": {"loss": NaN}}')
    assert ">2.00</text>" in curves.loss_dots(evals).svg
    ElementTree.fromstring(curves.validation_curve([{"step": 1, "tokens": 5, "valid_loss": 2.5}], evals).svg)


def test_texts_in_pictures_are_escaped_and_never_mathematics():
    svg = draw("x", 100, lambda figure: figure.text(0.5, 0.5, r"<script>$\frac{1}$</script>"))
    assert "<script" not in svg and ElementTree.fromstring(svg).findall(".//{*}text")[0].text == r"<script>$\frac{1}$</script>"
