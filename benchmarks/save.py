"""What saving a checkpoint costs a training: one that waits for it, and one that goes on while it is written.

A random model of SmolLM2-135M's sizes learns random tokens by cross-entropy, in one process. Steps without a save, steps with
a save that is waited for, and steps with one in the background take turns. The delay of a background save is what its
start adds to one step: the copy of all that is saved, and Megatron's plan of the files. Until it is written the steps share processor
and memory with it, and the last of them completes it: that is reported apart.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import arguments, publish

from minitron import engine
from minitron.arch.arch import Arch
from minitron.config.schema import Distill, Parallel, Train
from minitron.distillation.signal import NoTeacher
from minitron.distillation.step import distillation_loss

SMOLLM2 = Arch("llama", 30, 576, 1536, 9, 3, 64, 49152, 2048, share_embeddings_and_output_weights=True)
AROUND = 2  # plain steps before each save


def seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(repeats: int, settings: Train, scratch: Path) -> dict[str, list[float]]:
    """Seconds of everything, by name."""
    found: dict[str, list[float]] = {name: [] for name in ("plain", "waited for", "start", "largest beside", "sum beside", "beside")}
    with engine.world(Parallel(), "auto", 1) as world:
        model = engine.empty_model(SMOLLM2, world, torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        trainer = engine.Trainer(model, settings, world)
        loss = distillation_loss(model, NoTeacher(), Distill(cross_entropy=1.0), world)
        shape = (settings.global_batch_size, settings.seq_length + 1)
        batches = [engine.Batch(part) for part in torch.randint(0, SMOLLM2.vocab_size, shape).split(settings.micro_batch_size)]
        here = engine.Checkpoints(scratch, keep_last=1, in_background=True)

        def step() -> None:
            trainer.update(batches, loss(trainer.step, batches))
            trainer.step += 1

        step()
        here.begin(trainer)
        for _ in range(repeats):
            found["plain"] += [seconds(step) for _ in range(AROUND)]
            found["waited for"].append(seconds(lambda: here.save(trainer)))
            found["plain"] += [seconds(step) for _ in range(AROUND)]
            found["start"].append(seconds(lambda: here.save(trainer, final=False)))
            beside = []
            while here.pending is not None:
                beside.append(seconds(step) + seconds(lambda: here.poll(world)))
            plain = statistics.median(found["plain"])
            found["largest beside"].append(max(beside) - plain)
            found["sum beside"].append(sum(beside) - len(beside) * plain)
            found["beside"].append(len(beside))
        here.drop()
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2, help="sequences of 256 tokens per step (default: 2)")
    parser.add_argument("--folder", type=Path, help="where to save (default: the system's place for temporary files)")
    options = parser.parse_args()
    settings = Train(
        steps=10**6, global_batch_size=options.batch, micro_batch_size=options.batch, seq_length=256, warmup_steps=1, lr=1e-5, min_lr=0.0
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        found = measure(options.repeats, settings, Path(scratch))
    waited = statistics.median(found["waited for"])
    rows = [
        (name, *(f(found[key]) for f in (statistics.median, min, max)), statistics.median(found[key]) / waited)
        for name, key in (
            ("a step without a save", "plain"),
            ("a save that is waited for", "waited for"),
            ("starting one in the background: the delay of its step", "start"),
            ("beside it: the most that a step takes longer", "largest beside"),
            ("beside it: what all its steps take longer", "sum beside"),
        )
    ]
    beside = f"each in the background lay beside {min(found['beside']):.0f} to {max(found['beside']):.0f} steps"
    notes = [f"{options.repeats} saves of each kind in one run; {beside}"]
    columns = {"": "<", "seconds": ".3f", "least": ".3f", "most": ".3f", "of a save waited for": ".1%"}
    publish("Saving a checkpoint", columns, rows, notes, options.json)


if __name__ == "__main__":
    main()
