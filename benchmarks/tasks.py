"""Benchmark tasks of lm-eval on SmolLM2-135M: this project's sharded model against lm-eval's own backend for `transformers`.

The first rows of each task are asked of both; metrics and times stand side by side. The processes of the sharded side are torchrun's:
`torchrun --nproc-per-node 3 benchmarks/tasks.py parallel.tp=3` (SmolLM2 has 9 query heads in 3 groups). The data sets are those of
MINITRON_TEST_DATA, or come from the hub. Settings are those of `minitron evaluate`.
"""

import os
import shutil
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import arguments, hub, publish

from minitron import engine
from minitron.config.compose import compose
from minitron.data.tokenizing import load_tokenizer
from minitron.errors import EXIT_REQUEST, RequestError, say_once
from minitron.evaluation.tasks import Tasks, evaluate
from minitron.session import Session, session
from minitron.stages.evaluate import answer

TASKS = "hellaswag,arc_easy,piqa"


def plain(opened: Session, tasks: Tasks | None) -> dict[str, Any]:
    """What the tasks come to by lm-eval's own backend, in this process alone."""
    assert tasks is not None
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    cfg, folder = opened.cfg, opened.source.folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=opened.dtype).to(opened.world.device)
    most = cfg.eval.max_length or opened.source.arch.max_position_embeddings
    backend = HFLM(pretrained=model, tokenizer=load_tokenizer(str(folder)), batch_size=16, max_length=most, device=str(opened.world.device))
    return evaluate(backend, tasks, cfg.eval)


def compared(options: Namespace, overrides: list[str], scratch: str) -> tuple[list[tuple[Any, ...]], list[str]] | None:
    """Rows and notes of the table, on rank 0."""
    given = [f"eval.tasks=[{options.tasks}]", f"eval.limit={options.limit}", "eval.max_length=2048", f"run.dir={scratch}", "dtype=fp32"]
    cfg = compose("evaluate", ["recipe=smollm2_135m_to_100m", "eval.seq_length=1024", *given, *hub(), *overrides])
    with session(cfg, "evaluate") as opened:
        tasks = opened.tasks
        started = time.perf_counter()
        ours = answer(opened.load_source(), "sharded", opened, opened.world)
        middle = time.perf_counter()
        theirs = engine.main_only(opened.world, lambda: plain(opened, tasks)) or {}
        seconds = middle - started, time.perf_counter() - middle
        if not opened.world.is_main:
            return None
        layout = f"{opened.world.size} ranks, tp {opened.world.tp}, pp {opened.world.pp}, dp {opened.world.dp}"
    rows = [
        (name, metric, entry["rows"], one["value"], other["value"], one["stderr"], abs(one["value"] - other["value"]))
        for name, entry in ours.items()
        for metric, one in entry["metrics"].items()
        for other in [theirs[name]["metrics"][metric]]
    ]
    return rows, [f"sharded: {layout}, {seconds[0]:.0f} s; lm-eval's own backend in one process: {seconds[1]:.0f} s; {cfg.dtype}"]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", default=TASKS, help=f"names of lm-eval's tasks (default: {TASKS})")
    parser.add_argument("--limit", type=int, default=200, help="rows of each task (default: 200)")
    parser.add_argument("settings", nargs="*", help="settings of minitron evaluate: parallel.tp=3 eval.task_data=FOLDER ...")
    options = parser.parse_args()
    scratch = Path(tempfile.gettempdir(), f"minitron-tasks-{os.getppid()}")  # the parent of all processes is one torchrun
    try:
        found = compared(options, options.settings, str(scratch))
    except RequestError as error:
        say_once(str(error))
        return EXIT_REQUEST
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(scratch, ignore_errors=True)
    if found is not None:
        columns = {"task": "<", "metric": "<", "rows": ",d", "sharded": ".4f", "lm-eval hf": ".4f", "stderr": ".4f", "difference": ".1e"}
        publish("Benchmark tasks: sharded model against lm-eval's own backend", columns, *found, options.json)
        return int(any(row[-1] > 1e-3 for row in found[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
