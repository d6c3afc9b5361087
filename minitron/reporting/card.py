"""The model card of an export: README.md with the hub's front matter, and minitron_config.json, by which the run can be made again. Pure."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from minitron.reporting.generation import memory_told, speed_table, told
from minitron.reporting.report import loss_told, model_name
from minitron.reporting.results import Evals, Row, models_of, rows, task_rows
from minitron.reporting.runfiles import RunFiles
from minitron.reporting.wording import ABSENT, changes, counted, decimal, measurement, percent, ratio, size

CARD, SETTINGS = "README.md", "minitron_config.json"
SPEED_HEADING = "## Speed"
PAPERS = "[Minitron](https://arxiv.org/abs/2407.14679)"


@dataclasses.dataclass(frozen=True)
class Made:
    """What a card tells that the run's own files do not. `step`: of the checkpoint (None: nothing was trained); `parameters`: of the exported model;
    `front`: the front matter that is taken over from the original; `notices`: names of the files with its terms, which go along; `texts`: the
    text that was read, in words; `evals`: an evaluation of this very model, or None; `overrides`: the settings as on the command line."""

    step: int | None
    parameters: int
    front: Mapping[str, Any]
    notices: Sequence[str]
    texts: Sequence[str]
    evals: Evals | None
    overrides: Sequence[str]
    version: str
    fingerprints: Mapping[str, str]


def model_card(run: RunFiles, made: Made) -> str:
    """README.md."""
    method = "trained" if run.whole else "pruned" if made.step is None else "pruned and distilled"
    title = f"# {model_name(run)}, {method}: {size(made.parameters)} parameters"
    parts = [title, lead(run, made), *use(), *lineage(run, made), *evaluation(made), *terms(made), *again(run, made)]
    return f"---\n{front_matter(run, made)}---\n\n" + "\n\n".join(parts) + "\n"


def front_matter(run: RunFiles, made: Made) -> str:
    """The YAML that the hub reads."""
    methods = [] if run.whole else ["pruning", *(["distillation"] if made.step is not None else [])]
    known = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["minitron", *methods]}
    return yaml.safe_dump({**made.front, **known}, sort_keys=False, allow_unicode=True)


def lead(run: RunFiles, made: Made) -> str:
    """What it is, in a sentence or two."""
    original = code(run.setting("model.path") or run.path.name)
    if run.whole:
        return f"{original}, trained on for {counted(made.step or 0, 'step')}."
    before = f" of {size(run.original.num_parameters())} parameters" if run.original else ""
    kept = percent(ratio(made.parameters, run.original.num_parameters()), 0) if run.original else ABSENT
    retrained = (
        "It was not retrained: its losses are those of a cut model."
        if made.step is None
        else f"It was retrained on the predictions of its teacher for {counted(made.step, 'step')}."
        if run.setting("distill.loss") != "none"
        else f"It was retrained without a teacher for {counted(made.step, 'step')}."
    )
    return f"{original}{before}, cut to {kept} of them by structured pruning as in {PAPERS}. {retrained}"


def use() -> list[str]:
    """How to load it."""
    lines = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")',
    )
    return ["## Use", fenced("python", "\n".join(lines))]


def lineage(run: RunFiles, made: Made) -> list[str]:
    """Where it comes from, a row each."""
    found = {"Original": code(run.setting("model.path") or ABSENT), **cut(run), **training(run, made), "Text": "<br>".join(map(cell, made.texts))}
    return ["## Lineage", table(("", ""), [(name, value) for name, value in found.items() if value])]


def cut(run: RunFiles) -> dict[str, str]:
    """What was cut, and by what."""
    if run.original is None or run.pruned is None:
        return {}
    setting = run.setting
    read = f" over {setting('calibrate.samples'):,} samples of {setting('calibrate.seq_length'):,} tokens" if setting("calibrate.samples") else ""
    chosen = f"a search chose them of {counted(len(run.search.candidates), 'candidate')}" if run.search and run.search.chosen else ""
    return {
        "Sizes": "; ".join([", ".join(changes(run.original, run.pruned)) or "as the original's", *([chosen] if chosen else [])]),
        "Importance": f"{setting('calibrate.criterion') or ABSENT}{read}",
    }


def training(run: RunFiles, made: Made) -> dict[str, str]:
    """How it was retrained, and what came of that."""
    setting, seen = run.setting, [line for line in run.metrics if line["step"] <= (made.step or 0)]
    if made.step is None or not seen:
        return {}
    last = {name: value for line in seen for name, value in line.items() if value is not None}
    batch = f"{setting('train.global_batch_size'):,} sequences of {setting('train.seq_length'):,} tokens" if setting("train.seq_length") else ABSENT
    distilled = not run.whole and setting("distill.loss") != "none"
    return {
        "Teacher": code(setting("teacher.path") or setting("model.path") or ABSENT) if distilled else "",
        "Loss": ". ".join(dict.fromkeys(part.rstrip(".") for part in loss_told(run) if part)),
        "Training": f"{counted(made.step, 'step')} of {batch}, {size(last.get('tokens'))} tokens; learning rate {setting('train.lr')}, "
        f"{setting('train.schedule')}; {setting('dtype')}",
        "Losses": f"{decimal(last.get('loss'), 3)} in the last step; held out {decimal(last.get('valid_loss'), 3)}",
    }


def evaluation(made: Made) -> list[str]:
    """Every model on every text, and on every task."""
    if not made.evals:
        return ["## Evaluation", "This model was not evaluated before it was exported."]
    found = rows(made.evals)
    columns: dict[str, Callable[[Row], str]] = {
        "text": lambda row: cell(row.text),
        "model": lambda row: row.model,
        "parameters": lambda row: size(row.parameters),
        "loss": lambda row: decimal(row.loss, 3),
        "perplexity": lambda row: decimal(row.perplexity),
        "word perplexity": lambda row: decimal(row.word_perplexity),
        "gap closed": lambda row: "" if row.gap_closed is None else percent(row.gap_closed),
    }
    if all(row.word_perplexity is None for row in found):
        del columns["word perplexity"]
    told = "Losses in nats per token. Gap closed: how much of the loss that pruning added was taken back."
    return ["## Evaluation", table([*columns], [[write(row) for write in columns.values()] for row in found]), told, *tasks(made.evals)]


def tasks(evals: Evals) -> list[str]:
    """Every metric of every benchmark task, the models side by side; nothing where there was none."""
    lines = [
        (cell(row.name), cell(row.metric), ABSENT if row.rows is None else f"{row.rows:,}", *map(measurement, row.values), percent(row.retained))
        for row in task_rows(evals)
    ]
    if not lines:
        return []
    told = "Tasks of lm-eval, with standard errors. Retained: the last model's value as a fraction of the first one's, where more is better."
    return [table(("task", "metric", "questions", *models_of(evals), "retained"), lines), told]


def with_speed(text: str, found: Mapping[str, Any]) -> str:
    """A card with what was measured of the model's generation, in the place of what an earlier measurement said, or before the licence."""
    head, _, lines = speed_table(found)
    note = ". ".join(part for part in (told(found), memory_told(found)) if part)
    section = f"{SPEED_HEADING}\n\n{table(head, [[*map(cell, line)] for line in lines])}\n\n{note}.\n\n"
    parts = re.split(r"(?m)^(?=## )", text)
    parts = [part for part in parts if not part.startswith(f"{SPEED_HEADING}\n")]
    at = next((number for number, part in enumerate(parts) if part.startswith("## Licence\n")), len(parts))
    before = "".join(parts[:at]).rstrip("\n")
    return f"{before}\n\n{section}{''.join(parts[at:])}".rstrip("\n") + "\n"


def terms(made: Made) -> list[str]:
    """The licence, as the original has it."""
    licence = made.front.get("license_name", made.front.get("license"))
    named = f"That of the original: {cell(str(licence))}." if licence else "The original's folder names none: ask where it comes from."
    return ["## Licence", named + (f" Its terms: {', '.join(map(code, made.notices))}." if made.notices else "")]


def again(run: RunFiles, made: Made) -> list[str]:
    """The command that makes it again."""
    step = "" if made.step is None else f" The exported checkpoint is that of step {made.step:,}."
    text = f"minitron {made.version}; `{SETTINGS}` holds every setting, and fingerprints of what they name.{step}"
    if made.step is None:
        text += " The model was not retrained: `minitron export` with the same settings writes it after this command."
    return ["## Again", text, fenced("sh", " \\\n    ".join(map(shlex.quote, command(run, made))))]


def command(run: RunFiles, made: Made) -> list[str]:
    """The words of the command line."""
    until = [] if run.whole or made.step is not None else ["run.until=prune"]
    return ["minitron", "train" if run.whole else "compress", "run.dir=runs/again", *until, *made.overrides]


def settings_file(run: RunFiles, made: Made) -> str:
    """minitron_config.json."""
    told = {
        "minitron": made.version,
        "command": command(run, made),
        "checkpoint": made.step,
        "inputs": dict(made.fingerprints),
        "settings": yaml.safe_load(run.config or "{}"),
    }
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *lines))


def fenced(language: str, text: str) -> str:
    """A block of code, whatever is in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def cell(text: str) -> str:
    """Text that stays within its cell and is read as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """A name as it is spelled."""
    return f"`{cell(text).replace('`', '')}`"
