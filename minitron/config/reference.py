"""docs/settings.md: a page of every setting, drawn from the schema. `python -m minitron.config.reference` prints it. Pure text, no effects."""

from minitron.config.build import Setting, settings
from minitron.config.help import allowed, purpose
from minitron.config.verbs import VERBS, reads
from minitron.errors import shown

HEAD = """# Settings

<!-- written by `make settings` from minitron/config: change it there -->

Every setting: its default, its meaning, what it may be. `minitron VERB --help` prints those that a verb reads, `minitron VERB ... --cfg` the values
that a command line comes to. `SETTING=VALUE` on the command line sets one; a file below `configs/` several, by its name (`recipe=NAME`). A default
of `???` must be given by the verbs that need it; `null` means that there is none. The last table has the settings without a group.
"""


def reference() -> str:
    """The page."""
    every = list(settings())
    groups = list(dict.fromkeys(group_of(setting) for setting in every if "." in setting.name))
    parts = [HEAD, *(section(group, [setting for setting in every if group_of(setting) == group]) for group in groups)]
    return "\n".join([*parts, section("general", [setting for setting in every if "." not in setting.name])])


def section(group: str, every: list[Setting]) -> str:
    """One group: what it is for, which verbs read it, a row for each of its settings."""
    readers = {setting.name: [verb for verb in VERBS if reads(verb, setting.name)] for setting in every}
    usual = max(readers.values(), key=list(readers.values()).count)
    about = purpose(group) if group != "general" else ""
    lines = [f"## {group}", "", *([about, ""] if about else []), f"Read by {', '.join(usual)}.", "", "| setting | default | meaning | may be |"]
    lines.append("| --- | --- | --- | --- |")
    for setting in every:
        own = readers[setting.name]
        others = "" if own == usual else f"; read by {', '.join(own)}"
        cells = (f"`{setting.name}`", code(shown(setting.default)), f"{setting.rule['help']}{others}".replace("|", r"\|"), code(allowed(setting)))
        lines.append("".join(f"| {cell} " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


def group_of(setting: Setting) -> str:
    """What stands before the first point of a setting's name."""
    return setting.name.split(".")[0] if "." in setting.name else ""


def code(text: str) -> str:
    """In the type of programs, as a table's cell may hold it."""
    return "`" + text.replace("|", "\\|") + "`"


if __name__ == "__main__":
    print(reference(), end="")
