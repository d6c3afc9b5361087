"""What a measurement of generation comes to in rows, on the console, in the card, on the page and in pictures."""

import dataclasses
import json
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from minitron.reporting.card import with_speed
from minitron.reporting.drawing import COLORS
from minitron.reporting.generation import memory_told, show_speed, speed_pictures, speed_rows, speed_table, told
from minitron.reporting.report import speeds
from minitron.reporting.runfiles import read_run


def load(batch_size, prompt_length, first, others, peak):
    size = {"batch_size": batch_size, "prompt_length": prompt_length, "new_tokens": 5}
    return {**size, "first_seconds": first, "other_seconds": others, "peak_bytes": peak}


TEACHER = [load(1, 100, [0.2, 0.1, 0.4], [1.0, 2.0, 4.0], 900_000_000), load(8, 100, [1.0, 1.0, 1.0], [4.0, 4.0, 4.0], 1_500_000_000)]
STUDENT = [load(1, 100, [0.1, 0.1, 0.1], [0.5, 0.5, 0.5], 700_000_000), load(8, 100, [0.5, 0.5, 0.5], [2.0, 2.0, 2.0], 1_000_000_000)]
SIDES = {
    "teacher": {"weights_bytes": 400_000_000, "before_bytes": 300_000_000, "loads": TEACHER},
    "student": {"weights_bytes": 200_000_000, "before_bytes": 310_000_000, "loads": STUDENT},
}
FOUND = {
    "device": "a|processor", "dtype": "bf16", "repeats": 3, "threads": 2, "software": {"torch": "2.13", "transformers": "5.0"},
    "engines": {"transformers": SIDES},
}  # fmt: skip
BARE = {name: {**side, "weights_bytes": None, "before_bytes": None, "loads": [{**one, "peak_bytes": None} for one in side["loads"]]}
        for name, side in SIDES.items()}  # fmt: skip
BOTH = {**FOUND, "threads": None, "engines": {"transformers": SIDES, "vllm": BARE}}


def test_speeds_are_of_all_sequences_and_ratios_of_the_same_turns():
    rows = {(row.load, row.model): row for row in speed_rows(FOUND)}
    assert [*rows] == [(name, model) for name in ("1 x 100 + 5", "8 x 100 + 5") for model in ("teacher", "student")]
    teacher, student, eight = rows["1 x 100 + 5", "teacher"], rows["1 x 100 + 5", "student"], rows["8 x 100 + 5", "teacher"]
    assert teacher.first == (0.2, 0.1, 0.4)
    assert teacher.prefill == (500.0, 250.0, 1000.0)
    assert teacher.decode == (2.0, 1.0, 4.0)  # the first token is the prefill's
    assert (eight.prefill.median, eight.decode.median) == (800.0, 8.0)
    assert student.prefill_ratio == (2.0, 1.0, 4.0) and student.decode_ratio == (4.0, 2.0, 8.0)
    assert teacher.prefill_ratio is None and teacher.faster == ("", "") and student.faster == ("×2.00", "×4.00")


def test_the_table_names_a_load_once_and_engines_where_there_are_several():
    head, texts, lines = speed_table(FOUND)
    assert head[:texts] == ["load", "model"]
    assert [line[:2] for line in lines] == [["1 x 100 + 5", "teacher"], ["", "student"], ["8 x 100 + 5", "teacher"], ["", "student"]]
    assert lines[0][2:] == ["200 (100..400)", "500 (250..1,000)", "", "2.0 (1.0..4.0)", "", "400 MB", "900 MB"]
    head, texts, lines = speed_table(BOTH)
    assert head[:texts] == ["engine", "load", "model"] and len(lines) == 8
    assert lines[4][:3] == ["vllm", "1 x 100 + 5", "teacher"] and lines[4][-2:] == ["–", "–"]


@pytest.mark.parametrize(("width", "shown"), [(150, "200 (100..400)"), (100, "×2.00"), (60, "2.0")])
def test_a_console_of_any_width_has_the_figures_whole(width, shown):
    with (console := Console(width=width, force_terminal=False)).capture() as capture:
        show_speed(FOUND, console=console)
    text = capture.get()
    assert shown in text and "…" not in text and max(map(len, text.splitlines())) <= width
    assert "bf16 on a|processor, 2 threads" in " ".join(text.split())


def test_words_say_what_memory_is_of():
    assert "310 MB without any model" in memory_told(FOUND)
    on_gpu = {**FOUND, "engines": {"transformers": {name: {**side, "before_bytes": None} for name, side in SIDES.items()}}}
    assert memory_told(on_gpu) == "Memory: what torch allocated on the GPU at most"
    assert memory_told({**FOUND, "engines": {"vllm": BARE}}) == ""
    assert "thread" not in told(BOTH) and "transformers 5.0" in told(BOTH)


def test_pictures_are_sound_svg_in_the_colours_of_the_page():
    found = speed_pictures(BOTH)
    assert [picture.title for picture in found] == ["Speed, transformers", "Memory, transformers", "Speed, vllm"]
    for picture in found:
        ElementTree.fromstring(picture.svg)
        assert not re.search(r"(fill|stroke)[:=]\s*\"?#", picture.svg)
        assert set(re.findall(r"var\(--(\w+)\)", picture.svg)) <= set(COLORS)
    assert ">1.50 GB<" in found[1].svg and ">700 MB<" in found[1].svg


CARD = "---\nlicense: x\n---\n\n# A model\n\n## Evaluation\n\ntold\n\n## Licence\n\nThat of the original.\n\n## Again\n\n```sh\nminitron\n```\n"


def test_a_card_gets_its_section_before_the_licence_once():
    text = with_speed(CARD, FOUND)
    assert with_speed(text, FOUND) == text
    before, after = text.split("## Speed\n")
    assert before == CARD.split("## Licence")[0] and after.endswith(CARD[CARD.index("## Licence") :])
    assert "| 1 x 100 + 5 | teacher | 200 (100..400) |" in after and "a|processor" in after
    changed = with_speed(text, {**FOUND, "dtype": "fp32"})
    assert changed.count("## Speed\n") == 1 and "fp32 on" in changed and "bf16 on" not in changed
    assert with_speed("# Mine\n", FOUND).startswith("# Mine\n\n## Speed\n")


def test_the_page_has_it_where_it_was_measured_or_asked_for(tmp_path):
    run = read_run(tmp_path)
    assert speeds(run) == ""
    asked = dataclasses.replace(run, config="speed:\n  enabled: true\n")
    assert "<code>minitron speed</code> writes it" in speeds(asked)
    (tmp_path / "speed.json").write_text(json.dumps(FOUND), encoding="utf-8")
    section = speeds(read_run(tmp_path))
    assert 'id="speed"' in section and "200 (100..400)" in section and "Memory, transformers" in section and "a|processor" in section
