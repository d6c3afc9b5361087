"""How numbers and sizes are written, against texts written by hand."""

import pytest

from minitron.arch import Arch
from minitron.arch.arch import Layer
from minitron.data.manifest import Part
from minitron.reporting.wording import changes, counted, decimal, kept_of, percent, prepared, ranged, size, size_of

STORIES = Arch("llama", 5, 64, 172, 8, 4, 8, 512, 512)
UNEVEN = STORIES.replace(num_layers=3, ffn_hidden_size=128, layers=(Layer(12, 8, 4), Layer(60, 4, 4), Layer(128, 2, 2)))


@pytest.mark.parametrize(
    ("count", "text"), [(134515008, "134.5 M"), (8030261248, "8.0 B"), (1024, "1.0 K"), (999, "999"), (0, "0"), (None, "–"), (2.5e12, "2.5 T")]
)
def test_sizes_as_people_say_them(count, text):
    assert size(count) == text


def test_missing_numbers_are_dashes():
    assert decimal(None) == percent(None) == "–"
    assert (decimal(1234.567), decimal(2.6504, 3), percent(0.8266)) == ("1,234.57", "2.650", "82.7 %")


def test_one_is_not_many():
    assert [counted(number, "document") for number in (0, 1, 2000)] == ["0 documents", "1 document", "2,000 documents"]
    part = Part("train", "a.jsonl", documents=1, tokens=1234, largest_id=5, bytes={}, sha256={}, made_from={})
    assert prepared("train", part) == "train: 1 document, 1,234 tokens from a.jsonl"


def test_sizes_that_differ_between_layers_are_ranges():
    assert (ranged(1152, 1152), ranged(12, 1060)) == ("1,152", "12..1,060")
    assert [size_of(UNEVEN, field) for field in ("ffn_hidden_size", "num_attention_heads", "hidden_size")] == ["12..128", "2..8", "64"]
    assert [kept_of(STORIES, UNEVEN, field) for field in ("ffn_hidden_size", "num_layers")] == ["7..74 %", "60 %"]


def test_a_cut_is_told_size_by_size():
    assert changes(STORIES, STORIES.replace(hidden_size=48)) == ["hidden size 64 -> 48"]
    assert changes(STORIES, UNEVEN) == ["layers 5 -> 3", "MLP neurons per layer 172 -> 12..128", "attention heads 8 -> 2..8", "KV groups 4 -> 2..4"]
    assert changes(STORIES, STORIES) == []
