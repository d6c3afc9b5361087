"""`minitron data`: tokenise the run's texts into Megatron's indexed files."""

from minitron.config.schema import Config
from minitron.reporting.console import say
from minitron.reporting.wording import prepared
from minitron.session import Session, session


def run(cfg: Config) -> None:
    """Open the run and prepare its data."""
    with session(cfg, "data") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/data; what is there already and up to date stays."""
    manifest = opened.data
    opened.mark("data", done=False)  # nothing is half made: this puts the stages after it out of date
    opened.mark("data", done=True)
    if opened.world.is_main:
        for name, part in manifest.parts.items():
            say(prepared(name, part))
