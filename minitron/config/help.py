"""What `--help` prints, drawn from the table of verbs, the schema's metadata and the files under configs/. Pure text, no effects."""

import dataclasses
import re
import textwrap
from typing import Any

from minitron.config.build import Setting, settings
from minitron.config.compose import choices, groups
from minitron.config.schema import Config
from minitron.config.verbs import VERBS, reads
from minitron.errors import shown

TYPES: dict[Any, str] = {bool: "true | false", int: "int", float: "float", str: "text", dict: "NAME: value"}
UNBROKEN = "\N{NO-BREAK SPACE}"
BOUNDS = {"least": ">=", "above": ">", "most": "<=", "below": "<"}
EXITS = [
    ("0", "done"),
    ("1", "a defect of the program, with a traceback"),
    ("2", "the request is wrong: one line names the setting, its value and what is allowed"),
    ("75", "stopped early, by a signal or by the loss of another rank, with what is finished saved: the same command continues"),
]


def overview(width: int) -> str:
    """`minitron --help`: the verbs, one line each. `width` is the longest line in characters."""
    usage = [
        ("minitron VERB [recipe=NAME] [SETTING=VALUE ...]", ""),
        ("torchrun --nproc-per-node=8 -m minitron VERB ...", "the same on eight GPUs"),
        ("minitron VERB --help", "the verb's settings"),
        ("minitron VERB --cfg", "print the composed settings as YAML, run nothing"),
    ]
    return "\n".join(
        [
            *paragraph("Compress a pretrained language model: structured pruning, then knowledge distillation.", width, ""),
            *section("usage", rows(usage, width)),
            *section("verbs", rows([(verb, entry.summary) for verb, entry in VERBS.items()], width)),
            *section("ready-made choices", rows(ready_made(groups()), width)),
            *section("exit codes", rows(EXITS, width)),
        ]
    )


def verb_help(verb: str, width: int) -> str:
    """`minitron VERB --help`: every setting the verb reads, with its default, meaning, type and allowed values."""
    summary, read, needs, _, flags, carries = VERBS[verb]
    usage = [
        (f"minitron {verb} {'VERB ' if carries else ''}[recipe=NAME] [SETTING=VALUE ...]", ""),
        (f"torchrun --nproc-per-node=8 -m minitron {verb} ...", "the same on eight GPUs"),
        (f"minitron {verb} ... --cfg", "print the composed settings as YAML, run nothing"),
        *((f"minitron {verb} ... {flag}", meaning) for flag, meaning in flags),
    ]
    if "parallel" not in read or "run.dir" not in needs:  # what needs no folder works with settings alone, in one process
        del usage[1]
    lines = [
        *paragraph(f"minitron {verb}: {summary}", width, ""),
        *section("usage", rows(usage, width)),
        *section("must be set", [line for need in needs for line in paragraph(need.replace(" | ", " or "), width, "  ", hang="    ")]),
        *section("ready-made choices", rows(ready_made([group for group in groups() if group in ("recipe", *read)]), width)),
    ]
    every = [setting for setting in settings() if reads(verb, setting.name)]
    tables = {name: [setting for setting in every if setting.name.startswith(f"{name}.")] for name in read}
    for name, table in tables.items():
        if table:
            lines += section(name, [*about(name, width), *rows([described(setting) for setting in table], width)])
    if general := [setting for setting in every if "." not in setting.name]:
        lines += section("general", rows([described(setting) for setting in general], width))
    return "\n".join(lines + section("exit codes", rows(EXITS, width)))


def described(setting: Setting) -> tuple[str, str]:
    """`name=default` and the meaning, followed by the type and what is allowed: `[int >= 1]`."""
    return f"{setting.name}={shown(setting.default)}", f"{setting.rule['help']} [{allowed(setting).replace(' ', UNBROKEN)}]"


def allowed(setting: Setting) -> str:
    """What a setting may be: its types, or its values, with their bounds."""
    rule = setting.rule
    types = {**TYPES, list: f"list of {TYPES.get(setting.items)}"}
    kinds = [types[kind] for kind in setting.kinds if kind is not type(None)] if rule["allowed"] is None else map(shown, rule["allowed"])
    bounds = ", ".join(f"{sign} {rule[key]:g}" for key, sign in BOUNDS.items() if rule[key] is not None)
    return f"{' | '.join(kinds)} {bounds}".strip() + (" | null" if type(None) in setting.kinds else "")


def about(group: str, width: int) -> list[str]:
    """What the group's docstring says, where it has one of its own."""
    return paragraph(text, width, "  ") if (text := purpose(group)) else []


def purpose(group: str) -> str:
    """The group's docstring, where it has one of its own."""
    kind: Any = {field.name: field.type for field in dataclasses.fields(Config)}[group]
    invented = f"{kind.__name__}("  # how the docstring starts that dataclasses make up
    return "" if kind.__doc__.startswith(invented) else re.sub(r"\s+", " ", kind.__doc__).strip()


def ready_made(names: list[str]) -> list[tuple[str, str]]:
    """What the groups of configs/ offer."""
    return [(f"{group}={name}", comment) for group in names for name, comment in choices(group).items()]


def section(title: str, lines: list[str]) -> list[str]:
    return ["", title, *lines]


def rows(pairs: list[tuple[str, str]], width: int) -> list[str]:
    """Names on the left, their meaning wrapped beside them; a name too long for its column has a line of its own."""
    column = min(max(len(name) for name, _ in pairs), width // 2)
    lines = []
    for name, meaning in pairs:
        head = f"  {name:<{column}}  "
        if len(name) > column:
            lines.append(f"  {name}")
            head = " " * (column + 4)
        if meaning or len(name) <= column:
            lines += paragraph(meaning, width, head, hang=" " * (column + 4))
    return lines


def paragraph(text: str, width: int, head: str, hang: str | None = None) -> list[str]:
    """`text` wrapped to `width`, its first line after `head`, the others after `hang` (without one: after `head` too)."""
    hang = head if hang is None else hang
    lines = textwrap.wrap(re.sub(r"[ \n]+", " ", text), width, initial_indent=head, subsequent_indent=hang, break_on_hyphens=False)
    return [line.replace(UNBROKEN, " ").rstrip() for line in lines] or [head.rstrip()]
