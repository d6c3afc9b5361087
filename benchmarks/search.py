"""Does a search pay? The sizes that it chooses against others within the same budget, and its cost against distilling every finalist by itself.

With the first seed the ladder is climbed, and each of its finalists is distilled separately to the last rung: same cut, text, order and steps.
With the other seeds (other held-out documents, calibration, order) three candidates are: the chosen one, the widest, and the one in the middle of
the order that the losses before any training give. Seconds are those of the work alone, without start-up, tokenising and calibration, which both
ways need once.
Arguments after the options are settings of minitron, for example `search.rungs=[20,40,80]`.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, publish

from minitron.config.compose import compose
from minitron.config.schema import Config, Search
from minitron.reporting.runfiles import read_metrics
from minitron.search.candidates import Candidate, Results
from minitron.session import session
from minitron.stages import calibrate, distill, prune, search

RECIPE = ["recipe=smollm2_135m_search_100m", "logging.progress=false"]


Seconds = tuple[float, float]  # by the clock, and of the processor, which other work on the machine changes less


def now() -> Seconds:
    """This moment."""
    return time.perf_counter(), time.process_time()


def since(start: Seconds, before: Seconds = (0.0, 0.0)) -> Seconds:
    """What has passed, on top of `before`."""
    wall, processor = now()
    return before[0] + wall - start[0], before[1] + processor - start[1]


def climbed(cfg: Config) -> tuple[Results, Seconds]:
    """What the ladder found, and the seconds that it took. Tokens and scores stay in run.dir for the others."""
    with session(cfg, "search") as opened:
        calibrated(opened)
        started = now()
        search.work(opened)
        return Results.load(opened.folder), since(started)


def calibrated(opened: Any) -> None:
    """Tokens and scores, made once for a seed."""
    opened.data  # noqa: B018 -- prepared on first use
    if not opened.is_done("calibrate"):
        calibrate.work(opened)


def alone(cfg: Config, candidate: Candidate, folder: Path) -> tuple[float, Seconds]:
    """(held-out loss after the last rung's steps, seconds) of a candidate that is cut and distilled by itself, from run.dir's tokens and scores."""
    made = Path(cfg.run.dir)
    folder.mkdir()
    for name in ("stages.json", "config.yaml", "importance.safetensors", "source.json"):
        if (made / name).exists():
            shutil.copy2(made / name, folder / name)
    for name in ("data", "source"):
        if (made / name).is_dir():
            shutil.copytree(made / name, folder / name)
    last = cfg.search.rungs[-1]
    mine = dataclasses.replace(
        cfg,
        run=dataclasses.replace(cfg.run, dir=str(folder)),
        target=candidate.target(cfg.target),
        search=Search(),
        train=dataclasses.replace(cfg.train, steps=last, eval_interval=last, save_interval=last, eval_tokens=cfg.search.tokens),
    )
    seconds = (0.0, 0.0)
    for verb, work in (("prune", prune.work), ("distill", distill.work)):
        with session(mine, verb) as opened:
            if verb == "distill":
                opened.data  # noqa: B018 -- found as it is
            started = now()
            work(opened)
            seconds = since(started, seconds)
    loss = read_metrics(folder / "metrics.jsonl")[-1]["valid_loss"]
    shutil.rmtree(folder)
    return loss, seconds


def named(results: Results) -> dict[str, str]:
    """The three that are compared over seeds, by what they are; one may be two of them."""
    before = results.rungs[0].losses
    order = sorted(before, key=lambda name: statistics.mean(before[name]))
    widest = max(results.candidates, key=lambda candidate: (candidate.sizes["hidden_size"], candidate.sizes["ffn_hidden_size"]))
    assert results.chosen is not None
    return {"chosen": results.chosen, "widest": widest.name, "middle before training": order[len(order) // 2]}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1235, 1236])
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_args()
    losses: dict[str, list[float]] = {}
    spent: dict[str, Seconds] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, seed in enumerate(options.seeds):
            cfg = compose("search", [*RECIPE, *options.overrides, f"seed={seed}", f'run.dir="{scratch}/{seed}"'])
            if number == 0:
                results, taken = climbed(cfg)
                finalists, three = list(results.rungs[1].losses), named(results)
                todo = list(dict.fromkeys([*finalists, *three.values()]))
            else:
                with session(cfg, "search") as opened:
                    calibrated(opened)
                todo = list(dict.fromkeys(three.values()))
            for name in todo:
                loss, seconds = alone(cfg, results.candidate(name), Path(scratch) / "alone")
                losses.setdefault(name, []).append(loss)
                if number == 0:
                    spent[name] = seconds
                print(f"seed {seed}  {name}  {loss:.4f}  {seconds[0]:.0f} s", flush=True)
    rows = []
    for name in sorted(losses, key=lambda name: losses[name][0]):
        candidate, what = results.candidate(name), ", ".join(role for role, its in three.items() if its == name)
        first = statistics.mean(results.rungs[0].losses[name])
        ladder = next((statistics.mean(rung.losses[name]) for rung in reversed(results.rungs) if name in rung.losses), None)
        rest = [*losses[name][1:], *[None] * len(options.seeds)][: len(options.seeds) - 1]
        rows.append((name, what, candidate.costs["params"] / 1e6, first, ladder, losses[name][0], *rest))
    columns = {"candidate": "<", "which": "", "M": ".1f", "as cut": ".3f", "ladder": ".4f", **{f"seed {seed}": ".4f" for seed in options.seeds}}
    apart = [sum(spent[name][clock] for name in finalists) for clock in (0, 1)]
    winner = min(finalists, key=lambda name: losses[name][0])
    notes = [
        f"{len(results.candidates)} candidates of a grid of {results.grid}; {len(finalists)} finalists; rungs after {cfg.search.rungs} steps "
        f"of {cfg.train.global_batch_size * cfg.train.seq_length:,} tokens; {cfg.dtype}; nats per token on {cfg.search.tokens:,} held-out tokens",
        f"the ladder took {taken[0]:.0f} s, the {len(finalists)} separate distillations {apart[0]:.0f} s: ratio {taken[0] / apart[0]:.2f}; by "
        f"processor time {taken[1]:.0f} and {apart[1]:.0f} s: ratio {taken[1] / apart[1]:.2f}",
        f"seed N: distilled alone; the ladder chose {results.chosen}, and {winner} is the best of those distilled separately with its seed",
        "Kendall's tau from rung to rung: " + ", ".join("–" if rung.tau is None else f"{rung.tau:.2f}" for rung in results.rungs[1:]),
    ]
    publish("A search within a budget", columns, rows, notes, options.json)


if __name__ == "__main__":
    main()
