"""`minitron report`: one self-contained page about a run. No model is needed."""

from pathlib import Path

from minitron.config.schema import Config
from minitron.errors import refuse
from minitron.reporting.report import write_report


def run(cfg: Config) -> None:
    """Writes run.dir/report.html from the files that are there."""
    folder = Path(cfg.run.dir)
    if not (folder / "stages.json").is_file():
        raise refuse("run.dir", folder, "the folder of a run is needed")
    print(write_report(folder))
