"""Where a model comes from: a Hugging Face folder, a hub id, or a .gguf file. Everything cheap is checked before weights are read."""

import contextlib
import dataclasses
import io
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minitron.arch.arch import Arch
from minitron.arch.axes import dim_size, num_units, parameters, part_sizes
from minitron.arch.families import from_hf, hf_names
from minitron.errors import RequestError, first_line, refuse
from minitron.files import atomic_path, read_object, sha256
from minitron.packages import resolve_package
from minitron.weights.lineage import NOTICES

OF_GGUF = ("quantization_config", "dtype", "torch_dtype")  # what a config that is read from GGUF says of the file and not of the model
INDEX, SINGLE, SUFFIX = "model.safetensors.index.json", "model.safetensors", ".safetensors"
DTYPES = ("F64", "F32", "F16", "BF16")  # of weights, in safetensors' words
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
REFUSED_PICKLE = (
    "is a pickle, which can run code when it is read: where you trust it, convert it with "
    "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), which writes safetensors, and AutoTokenizer's likewise"
)


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
        if local.suffix in PICKLES:
            raise refuse(setting, path, f"it {REFUSED_PICKLE}")
        if local.suffix != ".gguf":
            raise refuse(setting, path, "a file must be a .gguf; otherwise give a Hugging Face folder or a hub id")
        return str(local)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or local.suffix == ".gguf":
        raise refuse(setting, path, "no such file or folder")
    return path


def fetch(path: str, setting: str) -> Path:
    """The local folder of a hub id (downloaded once into the hub's own cache)."""
    return _from_hub(path, setting, ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt", "README.md", *NOTICES])


def _from_hub(path: str, setting: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        raise refuse(setting, path, f"not a local folder, and the hub did not give it: {first_line(error)}") from error


def config_without_weights(path: str, setting: str) -> dict[str, Any]:
    """What config.json says of a model in any form of model.path. Weights are neither fetched nor read; a .gguf's header is, which takes seconds."""
    found = locate(path, setting)
    if found.endswith(".gguf"):
        return _gguf_config(Path(found))
    folder = Path(found) if Path(found).is_dir() else _from_hub(found, setting, ["config.json"])
    return read_object(folder / "config.json")


def _gguf_config(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    with _gguf_errors(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).to_dict()
    return {key: value for key, value in config.items() if key not in OF_GGUF}


@contextlib.contextmanager
def _gguf_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a reader of foreign files fails in as many ways as there are files
        raise RequestError(f"cannot read {path} as GGUF: {first_line(error)}") from error


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
            source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
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
    config = read_object(folder / "config.json")
    arch = from_hf(config, f"{setting}={folder}: config.json")
    files = _weight_files(folder, setting)
    shapes = _shapes(files, setting)
    # a tied head may be stored beside the embedding; it is then a copy of it
    for row, at in parameters(arch):
        names, transposed = hf_names(row, arch.family)
        rows = dict.fromkeys(names, 0)
        for name, size in zip(names, part_sizes(row.dims[0], arch), strict=True):
            rows[name] += num_units(row.dims[0], arch) * size
        for template, length in rows.items():
            name, expected = at.named(template), (length, *(dim_size(dim, arch) for dim in row.dims[1:]))
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
    """Tensor name -> file, from the index or the one file. Names in an index can't leave the folder; no pickle is opened."""
    if (folder / INDEX).is_file():
        weight_map = read_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise RequestError(f"{setting}={folder}: {INDEX} has no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(SUFFIX):
                raise RequestError(f"{setting}={folder}: {INDEX} names the file {name!r}; a {SUFFIX} file in the folder is needed, by its name alone")
        return {tensor: folder / name for tensor, name in weight_map.items()}
    if (folder / SINGLE).is_file():
        with _opened(folder / SINGLE, setting) as handle:
            return {name: folder / SINGLE for name in handle.keys()}  # noqa: SIM118 (not a dict)
    if pickled := next((file for file in sorted(folder.iterdir()) if file.suffix in PICKLES), None):
        raise RequestError(f"{setting}={folder}: {pickled.name} {REFUSED_PICKLE}")
    raise RequestError(f"{setting}={folder}: no {SINGLE} and no {INDEX} (of a hub id, pickled weights are not fetched)")


def _shapes(files: dict[str, Path], setting: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, as the headers say; a tensor that is not of floating point is refused, as weights of integers are quantised."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values())):
        with _opened(file, setting) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if files.get(name) == file:
                    part = handle.get_slice(name)
                    shapes[name] = tuple(part.get_shape())
                    if part.get_dtype() not in DTYPES:
                        raise RequestError(f"{setting}: {file}: tensor {name} is of type {part.get_dtype()}; allowed: {', '.join(DTYPES)}")
    return shapes


def _opened(file: Path, setting: str) -> Any:
    """safetensors checks header against file size when it opens a file, so a truncated one, or one whose header lies, is seen here."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{setting}: {file} is missing, truncated or not safetensors: {error}") from error
