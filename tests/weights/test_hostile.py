"""Folders that were made to do harm, or that nobody checked: each is refused in one line, before memory is asked for, and nothing of it is run."""

import ast
import contextlib
import json
import pickle
import re
import struct
from pathlib import Path

import pytest
from safetensors.torch import save_file

from minitron.arch.families import from_hf
from minitron.cli import main
from minitron.data.tokenizing import load_tokenizer
from minitron.errors import RequestError
from minitron.files import LARGEST_JSON, read_json
from minitron.weights.source import convert_gguf, locate, open_folder
from tests.oracles.models import TINY, save_model, saved_tensors

PACKAGE = Path(__file__).parents[2] / "minitron"
LLAMA = {"model_type": "llama", **TINY}
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def refusal(folder):
    with pytest.raises(RequestError) as refused:
        open_folder(folder, "model.path")
    line = str(refused.value)
    assert "\n" not in line and str(folder) in line
    return line


def with_header(folder, change):
    """The weight file with another header before the same data; its first 8 bytes say how long the header is."""
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def longer(header):
    header[NORM]["shape"] = [1 << 40]


def more_than_can_be_counted(header):
    header[NORM]["shape"] = [1 << 62, 1 << 62]


def reshaped(header):
    header[NORM]["shape"] = [6, 8]


def negative(header):
    header[NORM]["shape"] = [-48]


def beyond_the_end(header):
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin + (1 << 40), end + (1 << 40)]


def backwards(header):
    header[NORM]["data_offsets"].reverse()


def on_top_of_another(header):
    header[NORM]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]


def of_a_type_that_is_none(header):
    header[NORM]["dtype"] = "F31"


def of_integers(header):
    header[NORM]["dtype"] = "I32"


def a_list(header):
    return [1, 2, 3]


@pytest.mark.parametrize(
    "lie",
    [longer, more_than_can_be_counted, reshaped, negative, beyond_the_end, backwards, on_top_of_another, of_a_type_that_is_none, of_integers, a_list],
    ids=lambda lie: lie.__name__,
)
def test_a_header_that_lies(folder, lie):
    with_header(folder, lie)
    assert re.search("not safetensors|has shape|is of type I32; allowed: F64, F32, F16, BF16", refusal(folder))


@pytest.mark.parametrize(
    "data", [b"", b"\x01", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 6) + b'{"a":[', bytes(4096)]
)
def test_a_file_that_is_no_more_than_a_beginning(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    assert "not safetensors" in refusal(folder)


@pytest.mark.parametrize("keep", [4, 100, 3000, -1])
def test_a_file_that_is_cut_short(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "not safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "..", ".", "", "sub/model.safetensors", "~/model.safetensors", "pytorch_model.bin", 7, None, ["a"], {}],
    ids=repr,
)
def test_an_index_names_files_in_its_folder_alone(folder, name):
    save_file(saved_tensors(folder), folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    assert f"names the file {name!r}; a .safetensors file in the folder is needed" in refusal(folder)


@pytest.mark.parametrize("text", ["[]", "null", '{"weight_map": []}', '{"weight_map"', "[" * 100_000, '{"weight_map": {}}'])
def test_an_index_that_is_none(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    assert re.search(r"cannot read|has no weight_map|tensor .* is missing", refusal(folder))


def test_of_several_files_one_is_missing(tmp_path):
    folder = save_model(tmp_path / "model", max_shard_size="30KB")
    *_, last = sorted(folder.glob("*.safetensors"))
    last.unlink()
    assert f"{last.name} is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000: at most 10,000 is allowed"),
        ({"hidden_size": 10**9}, "hidden_size=1000000000: at most 1,048,576 is allowed"),
        ({"vocab_size": 10**15}, "vocab_size=1000000000000000: at most 67,108,864 is allowed"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: a positive whole number is needed"),
        ({"intermediate_size": -36}, "intermediate_size=-36: a positive whole number is needed"),
        ({"hidden_size": "48"}, "hidden_size='48': a positive whole number is needed"),
        ({"hidden_size": 48.0}, "hidden_size=48.0: a positive whole number is needed"),
        ({"hidden_size": float("nan")}, "hidden_size=nan: a positive whole number is needed"),
        ({"num_attention_heads": True}, "num_attention_heads=True: a positive whole number is needed"),
        ({"num_key_value_heads": [3]}, r"num_key_value_heads=[3]: a positive whole number is needed"),
        ({"head_dim": 0}, "head_dim=0: a positive whole number is needed"),
        ({"vocab_size": {}}, "vocab_size={}: a positive whole number is needed"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings=inf: a positive whole number is needed"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: a positive number is needed"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': a positive number is needed"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': true or false is needed"),
        ({"attention_bias": "no"}, "attention_bias='no': true or false is needed"),
        ({"rope_theta": "10000"}, "rope_theta='10000': a positive number is needed"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0: a positive number is needed"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "rope_theta=inf: a positive number is needed"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor=0: a positive number is needed"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0, float("nan")], "long_factor": [1.0]}},
            "short_factor=nan: a finite number is needed",
        ),
        ({"rope_scaling": [1, 2]}, "rope_scaling=[1, 2]: settings by name are needed"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope_type yarn needs factor"),
        ({"rope_parameters": {"rope_type": {}}}, "rope_type {} is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"hidden_act": ["silu"]}, "hidden_act=['silu'] is not supported"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_a_config_of_absurd_sizes(folder, changes, said):
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    assert f"model.path={folder}: config.json: {said}" in refusal(folder)
    with pytest.raises(RequestError) as refused:
        from_hf({**LLAMA, **changes}, "model.shape")
    assert str(refused.value).startswith("model.shape: ")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"model_type": "llama"', "[" * 100_000, "\x00", "{'model_type': 'llama'}"])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    assert f"cannot read {folder / 'config.json'}: " in refusal(folder)


def test_a_json_file_out_of_all_proportion_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "w") as handle:
        handle.truncate(LARGEST_JSON + 1)  # takes no room on the disk
    with pytest.raises(RequestError, match=r"config.json: 268,435,457 bytes, and at most 268,435,456 are read"):
        read_json(tmp_path / "config.json")


class Bomb:
    """Pickled, it leaves a file behind when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_the_pickle_of_these_tests_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(folder, tmp_path, name, capsys):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    assert f"{name} is a pickle" in refusal(folder)
    for path in (folder, folder / name):
        assert main(["calibrate", f"model.path={path}", f"run.dir={tmp_path / 'run'}", f"data.train={__file__}", "device=cpu"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)" in said
    assert not (tmp_path / "trace").exists()


def test_a_pickle_under_the_name_of_safetensors_is_not_read_as_one(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    assert "not safetensors" in refusal(folder)
    (folder / "model.gguf").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    with pytest.raises(RequestError, match=r"cannot read .* as GGUF"):
        convert_gguf(Path(locate(str(folder / "model.gguf"), "model.path")), tmp_path / "out", "fp32")
    assert not (tmp_path / "trace").exists()


@pytest.fixture
def with_code(folder, tmp_path):
    """A model, and a tokenizer, whose settings name a class in a file beside them; to import that would leave a file behind."""
    code = f"from pathlib import Path\nPath({str(tmp_path / 'trace')!r}).touch()\nclass Own: pass\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": own}))
    return folder


def test_code_beside_a_model_is_never_run(with_code, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: "y")  # whoever asks on a terminal would be told yes
    assert open_folder(with_code, "model.path").arch.hidden_size == TINY["hidden_size"]
    with contextlib.suppress(RequestError):  # whether the rest of it is a tokenizer is not the question
        load_tokenizer(str(with_code))
    assert not (tmp_path / "trace").exists()


def test_no_source_trusts_remote_code_or_reads_a_pickle():
    """Nobody says yes, and who asks transformers for a class by a folder's own settings says no each time: else it may ask on the terminal."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"torch\.load\(|allow_pickle=True", text), path
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            trusts = [word.value.value for word in call.keywords if word.arg == "trust_remote_code"]
            asks = isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
            assert trusts == [False] * asks, f"{path}:{call.lineno}"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model": {"type": "BPE", "vocab": 7, "merges": []}}', '{"version": "1.0", "model": {"type": "?"}}', "[" * 10_000]
)
def test_a_tokenizer_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(RequestError, match=r"model.path=.*: its tokenizer ") as refused:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_tokenizer_out_of_all_proportion_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "w") as handle:
        handle.truncate(1 << 34)
    with pytest.raises(RequestError, match=r"tokenizer.json has 17,179,869,184 bytes, and at most 536,870,912 are read"):
        load_tokenizer(str(tmp_path))
