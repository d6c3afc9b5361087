"""Where a model comes from: a Hugging Face folder, a hub id, or a .gguf file. Everything cheap is checked before weights are read."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minitron.arch.arch import Arch
from minitron.arch.axes import dim_size, num_units, parameters, part_sizes
from minitron.arch.families import from_hf, hf_names
from minitron.errors import RequestError, refuse
from minitron.files import atomic_path, read_json, sha256
from minitron.packages import resolve_package

OF_GGUF = ("quantization_config", "dtype", "torch_dtype")  # what a config that is read from GGUF says of the file and not of the model
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Source:
    """A checked Hugging Face folder: its config, its architecture, and the file that holds each tensor."""

    folder: Path
    config: dict[str, Any]
    arch: Arch
    files: dict[str, Path]

    def fingerprint(self) -> str:
        """Hash of config.json and, of every weight file, its name, size, header and 64 blocks of its data, spread evenly."""
        parts = [sha256(self.folder / "config.json")]
        for file in sorted(set(self.files.values())):
            size = file.stat().st_size
            with open(file, "rb") as handle:
                read = [handle.read(8 + int.from_bytes(handle.read(8), "little"))]
                for block in range(64):
                    handle.seek(size * block // 64)
                    read.append(handle.read(4096))
            parts.append(f"{file.name}:{size}:{hash_bytes(b''.join(read))}")
        return hash_bytes("|".join(parts).encode())


def hash_bytes(data: bytes) -> str:
    """Short hex hash."""
    import hashlib

    return hashlib.sha256(data).hexdigest()[:16]


def locate(path: str, setting: str) -> str:
    """`path` with package:NAME/FILE resolved; refuses what is neither a folder with config.json, a .gguf file nor a hub id."""
    if path.startswith("package:"):
        return str(resolve_package(path, setting))
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise refuse(setting, path, "the folder holds no config.json")
        return str(local)
    if local.is_file():
        if local.suffix != ".gguf":
            raise refuse(setting, path, "a file must be a .gguf; otherwise give a Hugging Face folder or a hub id")
        return str(local)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or local.suffix == ".gguf":
        raise refuse(setting, path, "no such file or folder")
    return path


def fetch(path: str, setting: str) -> Path:
    """The local folder of a hub id (downloaded once into the hub's own cache)."""
    return _from_hub(path, setting, ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt", "LICENSE*"])


def _from_hub(path: str, setting: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise refuse(setting, path, f"not a local folder, and the hub did not give it: {reason}") from error


def config_without_weights(path: str, setting: str) -> dict[str, Any]:
    """What config.json says of a model in any form of model.path. Weights are neither fetched nor read; a .gguf's header is, which takes seconds."""
    found = locate(path, setting)
    if found.endswith(".gguf"):
        return _gguf_config(Path(found))
    folder = Path(found) if Path(found).is_dir() else _from_hub(found, setting, ["config.json"])
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise refuse(setting, path, "config.json is not a JSON object")
    return config


def _gguf_config(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    with _gguf_errors(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    return {key: value for key, value in config.items() if key not in OF_GGUF}


@contextlib.contextmanager
def _gguf_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RequestError(f"cannot read {path} as GGUF: {str(error).strip().splitlines()[0]}") from error


def convert_gguf(path: Path, folder: Path, dtype: str) -> None:
    """Write a .gguf model as a Hugging Face folder, its quantised tensors widened to `dtype` (bf16 or fp32). Prints that it does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    print(f"convert {path.name}: its quantised tensors become {dtype} in {folder}", flush=True)
    logging.disable_progress_bar()
    with _gguf_errors(path):
        # it shows one bar all the same, which goes to whatever stderr is at the time
        with contextlib.redirect_stderr(io.StringIO()):
            source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # a fresh config of the plain class: the one read from GGUF carries quantisation settings that nobody must save
    settings = {key: value for key, value in source.config.to_dict().items() if key not in OF_GGUF}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    with atomic_path(folder) as temporary:
        model.to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def open_folder(folder: Path, setting: str) -> Source:
    """Check a Hugging Face folder: the family, the weight files (complete, none a pickle), every tensor's presence and shape."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise RequestError(f"{setting}={folder}: config.json is not a JSON object")
    arch = from_hf(config, f"{setting}={folder}: config.json")
    files = _weight_files(folder, setting)
    shapes = _shapes(files, setting)
    # a tied head may be stored beside the embedding; it is then a copy of it
    for row, layer in parameters(arch):
        names, transposed = hf_names(row, arch.family)
        rows = dict.fromkeys(names, 0)
        for name, size in zip(names, part_sizes(row.dims[0], arch), strict=True):
            rows[name] += num_units(row.dims[0], arch) * size
        for template, length in rows.items():
            name, expected = template.format(layer=layer), (length, *(dim_size(dim, arch) for dim in row.dims[1:]))
            expected, stored = expected[::-1] if transposed else expected, stored_name(name, shapes)
            if stored not in shapes:
                raise RequestError(f"{setting}={folder}: tensor {name} is missing")
            if shapes[stored] != expected:
                raise RequestError(f"{setting}={folder}: tensor {name} has shape {shapes[stored]}, config.json says {expected}")
    return Source(folder, config, arch, files)


def stored_name(name: str, stored: Container[str]) -> str:
    """The name that a tensor is stored by: folders of a model without its head, as GPT-2's on the hub, leave out the first word."""
    return name if name in stored else name.partition(".")[2]


def _weight_files(folder: Path, setting: str) -> dict[str, Path]:
    """Tensor name -> file, from the index or the one file. Names in an index can't leave the folder."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise RequestError(f"{setting}={folder}: {INDEX} has no weight_map")
        for name in set(weight_map.values()):
            if Path(name).name != name:
                raise RequestError(f"{setting}={folder}: {INDEX} names the file {name!r} outside the folder")
        return {tensor: folder / name for tensor, name in weight_map.items()}
    if (folder / SINGLE).is_file():
        with _opened(folder / SINGLE, setting) as handle:
            return {name: folder / SINGLE for name in handle.keys()}  # noqa: SIM118 (not a dict)
    if next(folder.glob("*.bin"), None):
        raise RequestError(f"{setting}={folder}: only pickled weights (.bin), which can run code when read; save them as safetensors first")
    raise RequestError(f"{setting}={folder}: no {SINGLE} and no {INDEX}")


def _shapes(files: dict[str, Path], setting: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values())):
        with _opened(file, setting) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if files.get(name) == file:
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
    return shapes


def _opened(file: Path, setting: str) -> Any:
    """safetensors checks header against file size when it opens a file, so a truncated one is seen here."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{setting}: {file} is missing, truncated or not safetensors: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json."""
    return dict(json.loads((folder / "config.json").read_text()))
