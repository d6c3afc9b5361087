"""The tests and benchmarks of one GPU, on a machine without a network, in one command; what they found goes into one JSON file.

    python benchmarks/gpu.py --out OUT --wheels WHEELS --model MODEL --text TEXT

The machine has Python with torch of a CUDA build. WHEELS is a folder of wheels of what it lacks: they are installed beside its own packages, into
`--work`, and nothing else is touched. MODEL is a Hugging Face folder or a .gguf file, TEXT a .jsonl(.gz) or .txt file; `--data` is the tests' data. A
file that is too large to be carried at once goes in parts: `--split FILE --into FOLDER` here, the parts' folder as MODEL there.

Each part of the work is a process of its own with its own limit of time; where one fails the others go on, and the last lines say which did.
OUT/results.json has all tables and outcomes, beside what an earlier run left there of parts that this one was not asked for; OUT/log.txt what
the processes printed, OUT/trace.png a step under the profiler. `--dry-run` says what would be run, and what is missing for it. Nothing
but Python's library is needed to start it.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
NEEDED = (
    "torch",
    "megatron.core",
    "transformers",
    "hydra",
    "omegaconf",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "psutil",
    "rich",
    "matplotlib",
)
FOR_TESTS = ("pytest", "pytest_timeout", "hypothesis")
RUN, TOO_LONG, FAILED, LEFT_OUT = "done", "too long", "failed", "left out"


@dataclasses.dataclass(frozen=True)
class Part:
    """A process: `{out}` is the file of its table, `{work}` a folder for what it makes, `{picture}` one to draw, the others what was given.

    `tiny` is the same with nothing of size. `minutes`: its limit."""

    command: str
    tiny: str
    minutes: float
    collect: str = "table"  # how its result is read: a name of COLLECT

    def needs(self) -> list[str]:
        """What has to be given for it."""
        return [name for name in ("model", "text") if f"{{{name}}}" in self.command]


def bench(script: str, options: str, tiny: str, minutes: float) -> Part:
    """A script of this folder that writes a table."""
    program = f"benchmarks/{script}.py --json {{out}}"
    return Part(f"{program} {options}", f"{program} {tiny}", minutes)


LOSS = "--device {device} --shapes 8192,4096,128256 --dtypes bf16"
TINY_LOSS = "--device {device} --shapes 600,16,128 --dtypes fp32 --repeats 1 --chunk-tokens 64 --sides"
SHAPES = "--device {device} --models"
GIVEN = "model.path={model} data.train={text} data.text_key=text"
MODEL = f"--set {GIVEN} device={{device}}"
COMPRESS = f"-m minitron compress recipe=smollm2_135m_to_100m_gpu {GIVEN} device={{device}} run.dir={{work}}"
SMALL = (
    "target.hidden_size=0.75 target.ffn_hidden_size=0.75 calibrate.samples=16 calibrate.seq_length=64 calibrate.micro_batch_size=4 train.steps=6 "
    "train.global_batch_size=4 train.micro_batch_size=4 train.seq_length=64 train.warmup_steps=1 train.eval_tokens=1024 train.eval_interval=3 "
    "eval.tokens=1024"
)
CUT = "calibrate.samples=8 calibrate.seq_length=32 target.hidden_size=0.75 target.ffn_hidden_size=0.75"
PARTS: dict[str, Part] = {
    "tests": Part(
        "-m pytest -m gpu tests/gpu -q -o timeout=300 --junitxml={out}",
        "-m pytest -m gpu tests/gpu/test_fused_loss.py -q --junitxml={out}",
        10,
        "tests",
    ),
    "loss": bench("kd_loss", LOSS, f"{TINY_LOSS} unfused floor 'fused, forward'", 8),
    **{
        f"loss_{tokens}": bench("kd_loss", f"{LOSS} --chunk-tokens {tokens} --sides 'fused, forward' floor", f"{TINY_LOSS} 'fused, forward'", 4)
        for tokens in (1024, 2048, 4096)
    },
    "loss_small": bench("kd_loss", "--device {device}", f"{TINY_LOSS} floor", 5),
    "trace": bench("trace", "--device {device} --picture {picture}", "--device {device} --tiny --dtype fp32 --picture {picture}", 4),
    "shapes_1b": bench("real_shapes", f"{SHAPES} Llama-3.2-1B --micro-batch 2", f"{SHAPES} Llama-3.2-1B --tiny --repeats 1", 8),
    "shapes_8b": bench("real_shapes", f"{SHAPES} Llama-3.1-8B --chunk-tokens 1024", f"{SHAPES} Llama-3.1-8B --tiny --repeats 1", 10),
    "calibrate": bench("calibrate", MODEL, f"{MODEL} calibrate.seq_length=32 --repeats 1 --microbatches 1 --dtypes fp32", 5),
    "distill_step": bench("distill_step", f"{MODEL} --repeats 10", f"{MODEL} {SMALL} --repeats 1 --dtypes fp32", 5),
    "save": bench("save", "", "--repeats 1 --batch 1", 5),
    "latency": bench("latency", "--dtype bf16", "--length 16", 4),
    "kept": bench("kept", f"--device {{device}} -- {GIVEN}", f"--device {{device}} -- {GIVEN} {CUT}", 8),
    "compress": Part(COMPRESS, f"{COMPRESS} dtype=fp32 {SMALL}", 25, "compression"),
}  # fmt: skip


def table(out: Path, work: Path, folder: Path) -> Any:
    """What a script wrote."""
    return json.loads(out.read_text(encoding="utf-8"))


def tests(out: Path, work: Path, folder: Path) -> Any:
    """Test by test its outcome, and the first line of why."""
    found = []
    for case in xml.etree.ElementTree.parse(out).iter("testcase"):
        wrong = next((case.find(kind) for kind in ("failure", "error", "skipped") if case.find(kind) is not None), None)
        outcome = {} if wrong is None else {"why": (wrong.get("message") or "").partition("\n")[0][:300]}
        name = f"{case.get('classname')}::{case.get('name')}"
        found.append({"test": name, "outcome": "passed" if wrong is None else wrong.tag, "seconds": float(case.get("time") or 0), **outcome})
    return found


def compression(out: Path, work: Path, folder: Path) -> Any:
    """The evaluation, the loss curve, and beside results.json the report."""
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = ("step", "tokens", "loss", "valid_loss", "lr", "grad_norm", "tokens_per_second", "tflop_per_second_per_rank", "mfu", "peak_memory_gib")
    thinned = [line for line in lines if "valid_loss" in line or line["step"] % max(1, len(lines) // 200) == 0]
    (folder / "report.html").write_bytes((work / "report.html").read_bytes())
    evaluation = json.loads((work / "eval.json").read_text(encoding="utf-8"))
    return {
        "eval": evaluation,
        "gap_closed": gap_closed(evaluation),
        "curve": [{name: line[name] for name in kept if name in line} for line in thinned],
    }


def gap_closed(evaluation: dict[str, Any]) -> float | None:
    """The share of the loss added by pruning that distillation took back, on held-out text."""
    teacher, pruned, student = (evaluation[name]["loss"] for name in ("teacher", "pruned", "student"))
    return (pruned - student) / (pruned - teacher) if pruned > teacher else None


COLLECT: dict[str, Callable[[Path, Path, Path], Any]] = {"table": table, "tests": tests, "compression": compression}


def split(file: Path, folder: Path, mib: float) -> list[Path]:
    """Cut a file into parts of at most `mib` MiB, with a checksum of the whole."""
    folder.mkdir(parents=True, exist_ok=True)
    content = file.read_bytes()
    size = int(mib * MIB)
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    paths = [folder / f"{file.name}.part{number:03d}of{len(pieces):03d}" for number in range(len(pieces))]
    for path, piece in zip(paths, pieces, strict=True):
        path.write_bytes(piece)
    (folder / f"{file.name}.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")
    return paths


def joined(folder: Path, work: Path) -> Path:
    """The file whose parts lie in a folder, in `work`. Raises ValueError, in a line, where some are missing or damaged."""
    sums = [*folder.glob("*.sha256")]
    if len(sums) != 1:
        raise ValueError(f"{folder} holds {len(sums)} files of a checksum: the parts of one file are needed, as --split makes them")
    name = sums[0].name.removesuffix(".sha256")
    parts = sorted(folder.glob(f"{name}.part*of*"))
    count = int(parts[0].name[-3:]) if parts else 0
    if not parts or len(parts) != count:
        raise ValueError(f"{folder} holds {len(parts)} of the {count or 'unknown number of'} parts of {name}")
    content = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(content).hexdigest() != sums[0].read_text().strip():
        raise ValueError(f"{folder}: the parts of {name} are not what was split")
    work.mkdir(parents=True, exist_ok=True)
    (work / name).write_bytes(content)
    return work / name


def installed(wheels: Path, site: Path) -> str | None:
    """Put all wheels of a folder into `site`, without a network and without what they ask for; what went wrong, if anything."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        return f"{wheels} holds no wheels"
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--quiet", "--target", str(site), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else f"pip could not install {wheels}: {(done.stderr or done.stdout).strip().splitlines()[-1]}"


def missing(names: Sequence[str], environment: dict[str, str]) -> list[str]:
    """Modules that a process here would not find."""
    script = (
        "import importlib.util, sys\n"
        "def there(name):\n"
        "    try: return importlib.util.find_spec(name) is not None\n"
        "    except ModuleNotFoundError: return False\n"
        "print(*[name for name in sys.argv[1:] if not there(name)])"
    )
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, env=environment, cwd=ROOT)
    return done.stdout.split()


def run(name: str, part: Part, options: argparse.Namespace, given: dict[str, str], environment: dict[str, str]) -> dict[str, Any]:
    """One part: its outcome, and where it is done its result."""
    work, out = options.work / name, options.work / f"{name}.json"
    out.unlink(missing_ok=True)
    places = {**given, "out": str(out), "work": str(work), "picture": str(options.out / "trace.png")}
    words = [word.format(**places) for word in shlex.split(part.tiny if options.tiny else part.command)]
    found: dict[str, Any] = {"command": shlex.join(["python", *words]), "status": FAILED}
    if options.dry_run:
        print(f"{name}: {found['command']}")
        return {**found, "status": LEFT_OUT, "why": "--dry-run"}
    began = time.monotonic()
    log = options.work / f"{name}.log"
    with open(log, "w", encoding="utf-8") as handle:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(60 * part.minutes)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    with open(options.out / "log.txt", "a", encoding="utf-8") as handle:
        handle.write(f"===== {name}: {found['command']}\n{text}\n")
    found["seconds"] = round(time.monotonic() - began, 1)
    wrong = None if code == 0 else f"not done after {part.minutes:g} minutes" if code is None else f"it ended with {code}"
    try:
        if wrong is None or out.is_file():  # what a part that failed has in its folder may be of an earlier run
            found["result"] = COLLECT[part.collect](out, work, options.out)
    except (OSError, ValueError, KeyError, xml.etree.ElementTree.ParseError) as error:
        wrong = wrong or f"what it left can't be read: {type(error).__name__}: {error}"
    if wrong is None:
        return {**found, "status": RUN}
    return {**found, "status": TOO_LONG if code is None else FAILED, "why": wrong, "tail": text.splitlines()[-30:]}


def machine(environment: dict[str, str]) -> dict[str, Any]:
    """What it all ran on."""
    script = (
        "import json, platform, torch, transformers; from importlib.metadata import version; gpu = torch.cuda.is_available(); "
        "print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__, "
        "'megatron-core': version('megatron-core'), 'transformers': transformers.__version__, "
        "'cuda': torch.version.cuda, 'gpu': torch.cuda.get_device_name() if gpu else None, "
        "'gpu_gib': round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if gpu else None}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"wrong": done.stderr.strip().splitlines()[-1:]}


def prepared(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """(what was given, as parts name it; the environment of the processes). Raises ValueError, in a line, for what can't be."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    path = [str(ROOT)]
    if options.wheels is not None:
        site = options.work / "site"
        if not options.dry_run and (wrong := installed(options.wheels, site)):
            raise ValueError(wrong)
        path.append(str(site))
    environment["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [environment.get("PYTHONPATH")])])
    if options.data is not None:
        environment["MINITRON_TEST_DATA"] = str(options.data.resolve())
    given = {"device": options.device}
    if options.model is not None:
        model = options.model
        if model.is_dir() and not (model / "config.json").is_file():
            model = joined(model, options.work)
        given["model"] = str(model.resolve())
    if options.text is not None:
        given["text"] = str(options.text.resolve())
    wanted = [*NEEDED, *(FOR_TESTS if "tests" in options.only else ()), *(["gguf"] if given.get("model", "").endswith(".gguf") else [])]
    if absent := missing(wanted, environment):
        line = f"not installed here: {', '.join(absent)}; put their wheels into --wheels"
        if not options.dry_run:
            raise ValueError(line)
        print(line)
    return given, environment


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/out"), help="where results go (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu/work"), help="where packages, checkpoints and logs lie (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, a .gguf file, or a folder of its parts")
    parser.add_argument("--text", type=Path, help="a text to train on")
    parser.add_argument("--data", type=Path, help="the tests' data (MINITRON_TEST_DATA)")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, help="begin no part that might end later than this")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="the same with nothing of size, to try the script itself")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument("--split", type=Path, metavar="FILE", help="cut a file into parts, and end")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="where --split puts them")
    parser.add_argument("--mib", type=float, default=56, help="of a part at most (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.split is not None:
        print(*split(options.split, options.into or options.split.parent, options.mib), sep="\n")
        return 0
    options.out, options.work = options.out.resolve(), options.work.resolve()
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        given, environment = prepared(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    file = options.out / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"parts": {}}
    results["machine"] = {**machine(environment), "device": options.device, "tiny": options.tiny}
    wrong = []
    for name in options.only:
        part, why = PARTS[name], None
        if lacking := [one for one in part.needs() if one not in given]:
            why = f"needs {' and '.join(f'--{one}' for one in lacking)}"
        elif options.minutes is not None and time.monotonic() - began + 60 * part.minutes > 60 * options.minutes:
            why = f"might take {part.minutes:g} minutes, which are not left of --minutes"
        found = {"status": LEFT_OUT, "why": why} if why else run(name, part, options, given, environment)
        if found["status"] in (FAILED, TOO_LONG):
            wrong.append(name)
        if found["status"] != LEFT_OUT or results["parts"].get(name, found)["status"] == LEFT_OUT:  # what an earlier run found stays
            results["parts"][name] = found
        print(f"{name}: {found['status']}" + (f" ({found['why']})" if "why" in found else f" in {found['seconds']:.0f} s"), flush=True)
        if not options.dry_run:  # after each: what is there stays, whatever happens to the next
            temporary = file.with_name(f".{file.name}.partial")
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, file)
    print(f"failed: {', '.join(wrong)}; see {options.out / 'log.txt'}" if wrong else "nothing failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
