"""Models of Transformer Engine's modules, by a stand-in for the package, against the same models of torch's: run as a program of its own.

Prints, of each sample of tests/oracles/samples.py, how far apart they are: {"logits": ..., "reread": ..., "gradient": ...}.
"""

import dataclasses
import json
import sys
from pathlib import Path

STAND_IN = Path(__file__).parent / "stand_in"


def main(folder: Path) -> None:
    sys.path.insert(0, str(STAND_IN))  # before Megatron looks for the package
    import torch

    from minitron.config.schema import Parallel, Train
    from minitron.distillation.signal import NoTeacher
    from minitron.distillation.step import distillation_loss
    from minitron.engine.batch import Batch
    from minitron.engine.checkpoint import load_model, save_model
    from minitron.engine.parallel import world
    from minitron.engine.specs import SPECS, pick_spec
    from minitron.engine.trainer import Trainer
    from minitron.stages.train import NEXT_TOKEN
    from minitron.weights.load import load
    from minitron.weights.source import open_folder
    from tests.oracles.models import tokens_of
    from tests.oracles.samples import save_samples
    from tests.oracles.sharded import whole_logits

    found: dict[str, dict[str, float | list[str]]] = {}
    settings = Train(steps=2, global_batch_size=2, micro_batch_size=2, seq_length=23, warmup_steps=1)
    with world(Parallel(), "cpu", 1) as here:
        for name, path in save_samples(folder).items():
            source = open_folder(path, "model.path")
            if pick_spec("auto", dataclasses.replace(here, device=torch.device("cuda")), source.arch) == "torch":
                continue
            tokens = tokens_of(61, 2, 24)
            models = {spec: load(source, here, torch.float32, spec) for spec in SPECS}
            logits = {spec: whole_logits(model, tokens, here) for spec, model in models.items()}
            save_model(models["transformer_engine"], folder / f"saved_{name}", here)
            again = whole_logits(load_model(folder / f"saved_{name}", here, torch.float32, "torch"), tokens, here)
            norms = []
            for model in models.values():
                trainer, batches = Trainer(model, settings, here), [Batch(tokens)]
                norms.append(trainer.update(batches, distillation_loss(model, NoTeacher(), NEXT_TOKEN, here)(0, batches))["grad_norm"])
                trainer.close()
            names = {
                spec: sorted({key.split("layers.0.")[1] for key, _ in model.named_parameters() if ".layers.0." in key})
                for spec, model in models.items()
            }
            found[name] = {
                "logits": (logits["torch"] - logits["transformer_engine"]).abs().max().item(),
                "reread": (again - logits["torch"]).abs().max().item(),
                "gradient": abs(norms[0] / norms[1] - 1),
                "fused": [key for key in names["transformer_engine"] if key not in names["torch"]],
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
