"""docs/settings.md is the page that the schema makes."""

from minitron.config.build import settings
from minitron.config.reference import reference
from tests.docs.blocks import ROOT


def test_the_page_is_current():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == reference(), "make settings"


def test_every_setting_has_a_row_of_four_cells():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [setting.name for setting in sorted(settings(), key=lambda setting: "." not in setting.name)]
    for row in rows:
        assert row.replace("\\|", "").count("|") == 5, row
