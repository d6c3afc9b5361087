"""Benchmark tasks of lm-eval on SmolLM2-135M: this project's sharded model against lm-eval's own backend for `transformers`.

The first rows of each task are asked of both; metrics and times stand side by side. The processes of the sharded side are torchrun's:
`torchrun --nproc-per-node 3 benchmarks/tasks.py parallel.tp=3` (SmolLM2 has 9 query heads in 3 groups). The data sets come from the hub, or
with eval.task_data from a folder. Settings are those of `minitron evaluate`.
"""

import contextlib
import os
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import ROOT, arguments, publish

sys.path.insert(0, str(ROOT))

from minitron import engine
from minitron.config.compose import compose
from minitron.data.tokenizing import load_tokenizer
from minitron.evaluation.asking import Answers, conducted, end_tokens
from minitron.evaluation.tasks import Tasks, evaluate
from minitron.session import Session, session

TASKS = "hellaswag,arc_easy,piqa"


def sharded(opened: Session, tasks: Tasks | None) -> dict[str, Any]:
    """The tasks' metrics of this project's model, on rank 0."""
    cfg, world, folder = opened.cfg, opened.world, opened.source.folder
    tokenizer = load_tokenizer(str(folder))
    silent = lambda what, total: contextlib.nullcontext(lambda count=1: None)  # noqa: E731
    answers = Answers(opened.load_source(), world, tokenizer, end_tokens(folder, tokenizer), cfg.eval.micro_batch_size * 1024, silent)

    def conduct(ask: Any) -> dict[str, Any]:
        from minitron.evaluation.harness import ShardedLM

        assert tasks is not None
        return evaluate(ShardedLM(ask, tokenizer, cfg.eval.max_length or opened.source.arch.max_position_embeddings), tasks, cfg.eval)

    return conducted(world, answers, conduct) or {}


def plain(opened: Session, tasks: Tasks) -> dict[str, Any]:
    """The same by lm-eval's own backend, in this process alone."""
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
    cfg = compose("evaluate", ["recipe=smollm2_135m_to_100m", *given, *overrides])
    with session(cfg, "evaluate") as opened:
        started = time.perf_counter()
        ours = sharded(opened, opened.tasks)
        middle = time.perf_counter()
        theirs = engine.main_only(opened.world, lambda: plain(opened, opened.__dict__["tasks"])) or {}
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
    with tempfile.TemporaryDirectory() as own:
        # one folder for all processes of torchrun
        shared = Path(tempfile.gettempdir(), f"minitron-lm-eval-{os.environ['TORCHELASTIC_RUN_ID']}") if "TORCHELASTIC_RUN_ID" in os.environ else own
        found = compared(options, options.settings, str(shared))
    if found is not None:
        columns = {"task": "<", "metric": "<", "rows": ",d", "sharded": ".4f", "lm-eval hf": ".4f", "stderr": ".4f", "difference": ".1e"}
        publish("Benchmark tasks: sharded model against lm-eval's own backend", columns, *found, options.json)
        return int(any(row[-1] > 1e-3 for row in found[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
