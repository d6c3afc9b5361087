"""Constraints for pip inside an image that has its own torch: prints FILE with the image's versions of what is compiled against its CUDA.

python docker/constraints.py constraints.txt > merged.txt
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

# torch and what must fit it bit by bit: another version of any of these would bring another torch with it, or not load
COMPILED = re.compile(r"(torch|torchvision|torchaudio|triton|pytorch-triton|transformer-engine.*|apex|flash-attn.*|numpy|nvidia-.*|cuda-.*)")


def canonical(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def merged(ours: list[str], installed: dict[str, str]) -> list[str]:
    """Lines `name==version`: `installed` (name -> version) of what is COMPILED, `ours` of the rest."""
    kept = {canonical(name): version for name, version in installed.items() if COMPILED.fullmatch(canonical(name))}
    rest = [line for line in ours if line.strip() and not line.startswith("#") and canonical(line.split("==")[0].strip()) not in kept]
    return [f"{name}=={version}" for name, version in sorted(kept.items())] + rest


def main() -> None:
    installed = {distribution.metadata["Name"]: distribution.version for distribution in distributions()}
    if "torch" not in installed:
        sys.exit("there is no torch here that could be kept")
    print(*merged(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(), installed), sep="\n")


if __name__ == "__main__":
    main()
