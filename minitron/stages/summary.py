"""`minitron summary`: what a run came to so far, on the console. No model is needed, and no other process disturbed."""

from pathlib import Path

from minitron.config.schema import Config
from minitron.errors import refuse
from minitron.record import RECORD, at_work, read_record
from minitron.reporting.family import read_family, show_family
from minitron.reporting.summary import show_summary, stage_states
from minitron.reporting.sweep import read_sweep, show_sweep


def run(cfg: Config) -> None:
    """Print the summary of run.dir; changes nothing there."""
    folder = Path(cfg.run.dir)
    if read_family(folder):
        show_family(folder)
        return
    if read_sweep(folder):
        show_sweep(folder)
        return
    if not (folder / RECORD).is_file():
        raise refuse("run.dir", folder, "the folder of a run is needed")
    show_summary(folder, stage_states(folder, read_record(folder)), at_work(folder))
