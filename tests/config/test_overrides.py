"""Settings written for the command line, and read back as they were."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.config.build import settings as all_settings
from minitron.config.build import value_at
from minitron.config.compose import compose, parsed
from minitron.config.overrides import OWN, overrides, written
from minitron.config.schema import Config
from minitron.config.verbs import reads


@settings(max_examples=10)  # Hydra's parser is slow
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="$")))
def test_any_text_is_read_back(text):
    assert parsed(f"data.train={written(text)}").value() == text


@pytest.mark.parametrize(
    "value", [None, True, False, 0, -7, 1e-05, 8e-4, 0.1, [1, 2], ["a b", "c,d"], [], "null", "True", "1e5", "a/b-c.jsonl", 'say "so"\\']
)
def test_a_value_is_read_back_with_its_kind(value):
    found = parsed(f"data.train={written(value)}").value()
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("recipe", ["llama31_8b_to_4b", "smollm2_135m_family"])
def test_a_recipe_without_its_name(recipe):
    """What a recipe makes is what its settings make one by one, but for where it lies and how processes share the work."""
    verb = "family" if "family" in recipe else "compress"
    asked = ["data.train=my.jsonl", "run.dir=here", f"recipe={recipe}", "eval.texts.other=other text.txt"]
    composed = compose(verb, asked, complete=False)
    again = compose(verb, [*overrides(composed, verb), "run.dir=here"], complete=False)
    names = [one.name for one in all_settings() if reads(verb, one.name) and not one.name.startswith(OWN)]
    assert {name: value_at(again, name) for name in names} == {name: value_at(composed, name) for name in names}
    assert value_at(again, "train.steps") != Config().train.steps
    assert not any(text.startswith((*OWN, "recipe")) for text in overrides(composed, verb))


def test_defaults_go_without_saying():
    assert overrides(Config(), "compress") == []
