"""The tables of a plan's training: whole at every width, with the figures of plan.json."""

import copy
import io

import pytest
from rich.console import Console

from minitron.config.compose import compose
from minitron.reporting.launch import best_of_each, duration, show_launch, shown_stages
from minitron.stages.plan import planned, shape_of

SETTINGS = ["recipe=llama31_70b_to_35b", "plan.nodes=8", "train.global_batch_size=64", "plan.price=2", "train.recompute=selective"]


@pytest.fixture(scope="module")
def launch():
    cfg = compose("plan", [*SETTINGS, "plan.layouts=3", "plan.micro_batch_sizes=[1]"])
    return planned(shape_of(cfg), cfg).launch


def shown(launch, width=140):
    out = io.StringIO()
    show_launch(launch, console=Console(file=out, width=width))
    return [line.split() for line in out.getvalue().splitlines() if line.strip()], out.getvalue()


@pytest.mark.parametrize("width", [72, 80, 100, 140])
def test_tables_are_whole_at_every_width(launch, width):
    lines, text = shown(launch, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for heading in ("GiB", "step", "days"):
        assert any(heading in line for line in lines)


def test_a_training_is_told_in_every_part(launch):
    lines, text = shown(launch)
    run = launch["runs"][0]
    assert text.startswith("on 64 x H100 in 8 nodes of 8: tp 8, pp 4, dp 2, sp, 32 x micro-batch 1, recompute selective")
    assert ["student's", "weights", *(f"{rank['parts']['student'] / 2**30:.1f}" for rank in run["memory"])] in lines
    assert ["GiB", "of", "a", "rank,", "75.0", "at", "most"] in [line[:7] for line in lines]
    assert ["together", *(f"{rank['total'] / 2**30:.1f}" for rank in run["memory"])] in lines
    gradients = next(one for one in run["traffic"] if one["what"] == "gradients")
    assert ["gradients", "reduce-scatter", "2", "replicas", "network", "1", f"{gradients['sent'] / 1e9:.3g}"] in [line[:7] for line in lines]
    for part, seconds in run["seconds"].items():
        assert (f"{100 * seconds / run['step_seconds']:.1f} %" in text) == bool(seconds), part
    outcome = next(line for line in lines if line[:2] == ["target", f"{run['peak_bytes'] / 2**30:.1f}"])
    assert outcome[-1] == f"{run['cost']:,.0f}"
    assert f"{run['gpu_hours']:,.0f}" in outcome
    assert "an estimate: 494 TFLOP/s of a GPU in a model's passes, 50 % of its peak (plan.efficiency)" in text


def test_layouts_come_with_their_place_and_that_of_the_settings(launch):
    lines, text = shown(launch)
    fitting = launch["layouts"]["fitting"]
    best = best_of_each(fitting)
    places = [line[0] for line in lines if line[0].rstrip(".").isdigit() and line[0].endswith(".")]
    assert places[:3] == ["1.", "2.", "3."]
    assert len({(row["layout"]["tp"], row["layout"]["pp"], row["layout"]["vpp"]) for row in best}) == len(best) < len(fitting)
    assert [row["step_seconds"] for row in best] == sorted(row["step_seconds"] for row in best)
    assert text.count("as set") == 1
    assert f"{launch['layouts']['tried']} layouts looked at, {len(fitting)} fit; why the others do not:" in text
    for reason, number in launch["layouts"]["fell"].items():
        assert [str(number), *reason.split()] in lines


def test_several_trainings_are_summed_up(launch):
    runs = [{**copy.deepcopy(launch["runs"][0]), "name": name} for name in ("large", "small")]
    lines, _ = shown({**launch, "runs": runs, "layouts": None})
    assert [line[0] for line in lines if line[0] in ("large", "small", "together")] == ["large", "small", "together"]
    hours = 2 * runs[0]["gpu_hours"]
    assert f"{hours:,.0f}" in next(line for line in lines if line[0] == "together")
    assert not any("NVLink" in line for line in lines)


def test_a_rank_too_full_is_red(launch):
    full = copy.deepcopy(launch)
    full["runs"][0]["memory"][1]["total"] = 80 * 2**30
    out = io.StringIO()
    show_launch(full, console=Console(file=out, width=140, force_terminal=True, color_system="standard"))
    assert "\x1b[1;31m   80.0" in out.getvalue()


def test_of_many_stages_the_first_the_fullest_and_the_last_are_shown():
    stages = [{"stage": number, "total": total} for number, total in enumerate([3, 2, 9, 4, 1, 5])]
    assert [stage["stage"] for stage in shown_stages(stages)] == [0, 2, 5]
    assert shown_stages(stages[:4]) == stages[:4]


def test_durations():
    assert [duration(value) for value in (1234.0, 12.34, 1.0, 0.0123, 2e-6)] == ["1,234 s", "12.3 s", "1 s", "12.3 ms", "0.002 ms"]
