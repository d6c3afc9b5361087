"""`minitron report`: one self-contained page about a run. No model is needed."""

from pathlib import Path

from minitron.config.schema import Config
from minitron.errors import refuse
from minitron.reporting.family import read_family, show_family
from minitron.reporting.report import write_report


def run(cfg: Config) -> None:
    """Writes run.dir/report.html from the files that are there; of a chain of models, says where their runs and pages are."""
    folder = Path(cfg.run.dir)
    if read_family(folder):
        show_family(folder)
        return
    if not (folder / "stages.json").is_file():
        raise refuse("run.dir", folder, "the folder of a run is needed")
    print(write_report(folder))
