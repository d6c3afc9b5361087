"""`minitron export`: the student as a Hugging Face folder that transformers and vLLM load as it is."""

from minitron.config.schema import Config
from minitron.reporting.console import say
from minitron.reporting.wording import counted
from minitron.session import Session, session
from minitron.weights.save import export


def run(cfg: Config) -> None:
    """Open the run and export."""
    with session(cfg, "export") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/hf: the model of the checkpoint that run.checkpoint asks for, or the pruned model where nothing was trained yet."""
    step = opened.chosen()
    model = opened.load_pruned() if step is None else opened.load_student()
    opened.mark("export", done=False)
    export(model, opened.world, opened.source.config, opened.source.folder, opened.folder / "hf", opened.dtype)
    opened.mark("export", done=True)
    if opened.world.is_main:
        retrained = "model" if opened.is_whole() else "student"
        what = "pruned model, not retrained" if step is None else f"{retrained} after {counted(step, 'step')}"
        say(f"{opened.folder / 'hf'}: the {what}")
