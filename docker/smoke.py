"""Does this installation work? Compresses a tiny random model on the CPU, from text to an exported folder that transformers loads.

    python docker/smoke.py            any installation
    python docker/smoke.py --image    also what an image with CUDA must have, and `torchrun` with two ranks

It needs no GPU and no network, and takes about a minute. Everything runs but the training, whose kernels are a GPU's where
Transformer Engine or apex are installed.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
VERBS = ("data", "calibrate", "prune", "evaluate", "export", "report")


def make_model(folder: Path, text: str) -> None:
    """A random Llama of a few thousand parameters, with a tokenizer trained on `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=512, special_tokens=["<end>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=128, **sizes)).save_pretrained(folder)


def out_of_range(requirements: Iterable[str], versions: dict[str, str]) -> list[str]:
    """Which of `versions` (name -> version) a list of requirements, extras' among them, rules out."""
    asked = [Requirement(line) for line in requirements]
    return [
        f"{one.name} {versions[one.name]}, asked for is {one.specifier}"
        for one in asked
        if one.name in versions and not one.specifier.contains(versions[one.name], prereleases=True)
    ]


def check_image() -> None:
    """torch is the image's own and fits its CUDA compiler, Transformer Engine is one that Megatron names, apex is NVIDIA's with its kernels."""
    import torch
    import transformer_engine.pytorch  # noqa: F401
    from apex.optimizers import FusedAdam  # noqa: F401

    import amp_C  # noqa: F401 # isort: skip -- apex's kernels, which load after torch

    asked = [line for package in ("megatron-core", "minitron") for line in requires(package) or ()]
    wrong = out_of_range(asked, {name: version(name) for name in ("torch", "transformer-engine")})
    assert not wrong, "; ".join(wrong)
    assert not Path(torch.__file__).is_relative_to(sys.prefix), f"pip brought another torch: {torch.__file__}"
    release = re.search(r"release (\d+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout)
    assert release and torch.version.cuda and torch.version.cuda.split(".")[0] == release[1], f"torch {torch.version.cuda}, nvcc {release}"


def main() -> None:
    image = "--image" in sys.argv[1:]
    if image:
        check_image()
    with tempfile.TemporaryDirectory() as scratch:
        model, run = Path(scratch, "model"), Path(scratch, "run")
        text = Path(scratch, "text.txt")
        text.write_text((ROOT / "LICENSE").read_text(encoding="utf-8") * 2, encoding="utf-8")
        make_model(model, text.read_text(encoding="utf-8"))
        settings = [
            f'run.dir="{run}"', f'model.path="{model}"', f'data.train="{text}"', "device=cpu", "logging.progress=false",
            "target.hidden_size=48", "target.ffn_hidden_size=64", "calibrate.samples=8", "calibrate.seq_length=32", "eval.seq_length=32",
        ]  # fmt: skip
        for verb in VERBS:
            ranks = ["torchrun", "--standalone", "--nproc-per-node=2"] if image and verb == "calibrate" else [sys.executable]
            layout = ["parallel.tp=2"] if "torchrun" in ranks else []
            subprocess.run([*ranks, "-m", "minitron", verb, *settings, *layout], check=True)
        from transformers import AutoModelForCausalLM

        pruned = AutoModelForCausalLM.from_pretrained(run / "hf")
        assert pruned.config.hidden_size == 48, pruned.config
    print("the installation works")


if __name__ == "__main__":
    main()
