"""`minitron export`: the student as a Hugging Face folder that transformers and vLLM load as it is, with a card that says where it comes from."""

import minitron
from minitron import engine
from minitron.config.overrides import overrides
from minitron.config.schema import Config
from minitron.data.manifest import Manifest
from minitron.record import read_record, read_settings
from minitron.reporting.card import CARD, SETTINGS, Made, model_card, settings_file
from minitron.reporting.console import say
from minitron.reporting.runfiles import read_run
from minitron.reporting.wording import counted, prepared
from minitron.session import Session, session
from minitron.weights.lineage import carried, notices
from minitron.weights.save import export


def run(cfg: Config) -> None:
    """Open the run and export."""
    with session(cfg, "export") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/hf: the model of the checkpoint that run.checkpoint asks for, or the pruned model where nothing was trained yet."""
    step = opened.chosen()
    model = opened.load_pruned() if step is None else opened.load_student()
    texts = engine.on_main(opened.world, lambda: card(opened, step, model.arch.num_parameters()))
    opened.mark("export", done=False)
    export(model, opened.world, opened.source.config, opened.source.folder, opened.folder / "hf", opened.dtype, texts)
    opened.mark("export", done=True)
    if opened.world.is_main:
        retrained = "model" if opened.is_whole() else "student"
        what = "pruned model, not retrained" if step is None else f"{retrained} after {counted(step, 'step')}"
        say(f"{opened.folder / 'hf'}: the {what}")


def card(opened: Session, step: int | None, parameters: int) -> dict[str, str]:
    """The content of README.md and minitron_config.json: of the run's files, and of the original's folder."""
    found, record, inputs = read_run(opened.folder), read_record(opened.folder), opened.inputs("export")
    evaluated = record.get("evaluate", {})
    same = evaluated.get("done") and evaluated["inputs"].get("checkpoint") == inputs["checkpoint"]
    verb, source = "train" if found.whole else "compress", opened.source.folder
    parts = Manifest.load(opened.folder / "data").parts
    made = Made(
        step=step,
        parameters=parameters,
        front=carried(source),
        notices=[file.name for file in notices(source)],
        texts=[prepared(name, part) for name, part in parts.items()],
        evals=found.evals if same else None,
        overrides=overrides(read_settings(opened.folder / "config.yaml"), verb),
        version=minitron.__version__,
        fingerprints=inputs,
    )
    return {CARD: model_card(found, made), SETTINGS: settings_file(found, made)}
