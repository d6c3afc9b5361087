"""`minitron export`: the student as a Hugging Face folder that transformers and vLLM load as it is."""

from minitron import engine
from minitron.config.schema import Config
from minitron.reporting.console import say
from minitron.session import Session, session
from minitron.weights.save import export


def run(cfg: Config) -> None:
    """Open the run and export."""
    with session(cfg, "export") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/hf: the student of the newest checkpoint, or the pruned model where nothing was trained yet."""
    trained = engine.on_main(opened.world, opened.checkpoints.latest) is not None
    model = opened.load_student() if trained else opened.load_pruned()
    opened.mark("export", done=False)
    export(model, opened.world, opened.source.config, opened.source.folder, opened.folder / "hf", opened.dtype)
    opened.mark("export", done=True)
    if opened.world.is_main:
        say(f"{opened.folder / 'hf'}: the {'student' if trained else 'pruned model, not retrained'}")
