"""The help pages hold every setting, fit their width and say what is allowed."""

import pytest

from minitron.config.build import settings
from minitron.config.compose import choices
from minitron.config.help import overview, rows, verb_help
from minitron.config.verbs import VERBS


@pytest.mark.parametrize("width", [60, 80, 120])
def test_pages_fit_their_width_and_end_lines_cleanly(width):
    for page in [overview(width), *(verb_help(verb, width) for verb in VERBS)]:
        for line in page.splitlines():
            assert len(line) <= width
            assert line == line.rstrip()
            assert "\N{NO-BREAK SPACE}" not in line


def test_the_overview_has_every_verb_and_every_recipe():
    page = overview(200)
    for verb, entry in VERBS.items():
        assert f"  {verb:<9}  {entry.summary}" in page
    for recipe, about in choices("recipe").items():
        assert f"recipe={recipe}" in page
        assert about in page


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_page_has_the_settings_it_reads_and_no_others(verb):
    page = verb_help(verb, 300)
    names = [line.split("=")[0].strip() for line in page.splitlines() if " [" in line and "=" in line]
    expected = {setting.name for setting in settings() if setting.name.split(".")[0] in VERBS[verb].groups}
    if verb not in ("compress", "family", "evaluate", "export"):
        expected -= {"run.checkpoint"}
    if verb != "compress":
        expected -= {"run.until"}
    if verb != "plan":
        expected -= {"model.shape"}
    if verb == "search":
        expected -= {"train.steps"}
    if verb == "plan":
        expected -= {name for name in expected if name.startswith("data.") and name != "data.separate_documents"}
    if verb == "speed":
        expected -= {name for name in expected if name.startswith(("teacher.", "logging."))} - {"teacher.path", "logging.progress"}
    if verb not in ("compress", "family"):
        expected -= {"speed.enabled"}
    if verb == "evaluate":
        expected -= {name for name in expected if name.startswith("train.") and name != "train.seq_length"}
    assert sorted(name for name in names if " " not in name) == sorted(expected)


@pytest.mark.parametrize(
    "line",
    [
        "train.steps=1000                  optimizer steps [int >= 1]",
        "train.recompute=none              activations of the trained model",
        "train.beta1=0.9                   Adam's first decay [float >= 0, <= 0.9999]",
        "target.num_query_groups=null                     KV groups per layer [int | float | list of int > 0 | null]",
        "search.ffn_expansion=null         MLP neurons to look at, as multiples of the width",
        "[list of float > 0 | null]",
        "[list of int >= 1 | null]",
        "logging.progress=true           progress bars on the console [true | false]",
        "run.dir=???          folder that receives",
        "target.num_moe_experts=null                      experts of each layer that has them; null where a model has none",
        "parallel.ep=1                  expert-parallel ranks, out of the data- and context-parallel ones: each holds so many of the experts",
        "teacher.parallel.tp=null           tensor-parallel ranks of the teacher (null: the student's)",
        "Sizes of the compressed model: a size (whole number), a kept fraction",
        "75  stopped early, by a signal or by the loss of another rank, with what is finished saved: the same command continues",
    ],
)
def test_default_meaning_type_and_allowed_values(line):
    assert line in verb_help("compress", 200)


def test_the_summary_of_compress_has_its_stages_in_order():
    from minitron.stages.compress import STAGES

    stages = [*STAGES, "report"]
    summary = VERBS["compress"].summary
    assert sorted(stages, key=summary.index) == stages


def test_every_setting_is_read_by_some_verb():
    pages = "\n".join(verb_help(verb, 300) for verb in VERBS)
    for setting in settings():
        assert f"  {setting.name}=" in pages


def test_a_long_name_has_a_line_of_its_own():
    assert rows([("short", "meaning"), ("x" * 25, "meaning")], 40) == [
        "  short                 meaning",
        "  " + "x" * 25,
        "                        meaning",
    ]
