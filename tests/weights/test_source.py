"""Model folders that are refused, each in one line that names the setting and what is wrong, before any weight is read."""

import json

import pytest
from safetensors.torch import save_file
from tqdm.auto import tqdm

from minitron.errors import RequestError
from minitron.weights.source import config_without_weights, convert_gguf, locate, open_folder
from tests.oracles.models import BIASES, save_model, saved_tensors


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def not_safetensors(folder):
    (folder / "model.safetensors").write_text("a page that says 404")


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_tensor(folder):
    tensors = saved_tensors(folder)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def with_a_transposed_tensor(folder):
    tensors = saved_tensors(folder)
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].t().contiguous()
    save_file(tensors, folder / "model.safetensors")


def index_leads_elsewhere(folder):
    weight_map = dict.fromkeys(saved_tensors(folder), "../other/model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def index_without_map(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def index_names_an_absent_file(folder):
    weight_map = dict.fromkeys(saved_tensors(folder), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncated, "model.safetensors is missing, truncated or not safetensors"),
        (not_safetensors, "model.safetensors is missing, truncated or not safetensors"),
        (without_weights, "no model.safetensors and no model.safetensors.index.json"),
        (only_pickles, "pytorch_model.bin is a pickle"),
        (without_a_tensor, "tensor model.layers.2.mlp.up_proj.weight is missing"),
        (with_a_transposed_tensor, r"tensor model.layers.1.mlp.down_proj.weight has shape \(36, 48\), config.json says \(48, 36\)"),
        (index_leads_elsewhere, "names the file '../other/model.safetensors'; a .safetensors file in the folder is needed"),
        (index_without_map, "has no weight_map"),
        (index_names_an_absent_file, "model-00001-of-00001.safetensors is missing"),
        (broken_config, "cannot read .*config.json"),
        (config_is_a_list, "config.json: it is not a JSON object"),
        (lambda folder: change_config(folder, model_type="mamba"), "model_type 'mamba' is not supported; supported: gemma, .*, qwen3_moe; docs"),
        (lambda folder: change_config(folder, num_hidden_layers=5), "tensor model.layers.4.input_layernorm.weight is missing"),
        (lambda folder: change_config(folder, vocab_size=60), r"tensor model.embed_tokens.weight has shape \(61, 48\), config.json says \(60, 48\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_spoiled_folder_is_refused_in_one_line(folder, spoil, said):
    spoil(folder)
    with pytest.raises(RequestError, match=said) as refusal:
        open_folder(folder, "model.path")
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_no_obstacle(folder):
    tensors = saved_tensors(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert open_folder(folder, "model.path").arch.share_embeddings_and_output_weights


def test_the_fingerprint_tells_models_apart_by_their_headers(tmp_path):
    first, second = (open_folder(save_model(tmp_path / name, **changes), "model.path") for name, changes in (("a", {}), ("b", BIASES)))
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint() == open_folder(save_model(tmp_path / "again"), "model.path").fingerprint()


def test_the_fingerprint_tells_apart_two_trainings_of_one_shape_with_a_frozen_embedding(folder):
    before = open_folder(folder, "model.path").fingerprint()
    tensors = saved_tensors(folder)
    save_file({name: tensor if "embed" in name else tensor + 0.1 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    assert open_folder(folder, "model.path").fingerprint() != before


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/no/such/folder", "model.path=/no/such/folder: no such file or folder"),
        ("./nothing", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("package:no_such_package/model.gguf", "no Python package no_such_package is installed"),
    ],
)
def test_paths_that_lead_nowhere(path, said):
    with pytest.raises(RequestError, match=said):
        locate(path, "model.path")


def test_a_folder_and_files_of_another_kind(tmp_path):
    with pytest.raises(RequestError, match=r"the folder holds no config.json"):
        locate(str(tmp_path), "model.path")
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(RequestError, match=r"a file must be a .gguf"):
        locate(str(tmp_path / "model.h5"), "model.path")


def test_a_conversion_announces_itself_and_shows_no_bar_of_others(tmp_path, monkeypatch, capsys):
    """Reading stops after the bar here; what a whole conversion makes is held on a real model."""

    def read(*args, **settings):
        list(tqdm([1, 2], desc="Converting and de-quantizing GGUF tensors..."))
        raise ValueError("not a GGUF after all\nmore")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    with pytest.raises(RequestError, match=r"cannot read .*model\.gguf as GGUF: not a GGUF after all$"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "source", "bf16")
    assert capsys.readouterr() == (f"convert model.gguf: its quantised tensors become bf16 in {tmp_path / 'source'}\n", "")


def test_hub_ids_and_gguf_files_are_left_as_they_are(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert locate("meta-llama/Llama-3.1-8B", "model.path") == "meta-llama/Llama-3.1-8B"
    assert locate(str(tmp_path / "model.gguf"), "model.path") == str(tmp_path / "model.gguf")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    from minitron.weights.source import fetch

    with pytest.raises(RequestError, match=r"model.path=nobody/nothing: not a local folder, and the hub did not give it") as refusal:
        fetch("nobody/nothing", "model.path")
    assert "\n" not in str(refusal.value)


def test_a_broken_gguf_is_one_line(tmp_path):
    from minitron.weights.source import convert_gguf

    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RequestError, match=r"cannot read .*model.gguf as GGUF") as refusal:
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out", "fp32")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_of_a_hub_id_only_the_config_is_fetched(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path))
    assert config_without_weights("someone/model", "model.path") == {"model_type": "llama"}
    assert asked == [("someone/model", ["config.json"])]
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RequestError, match=r"cannot read .*config.json: it is not a JSON object"):
        config_without_weights("someone/model", "model.path")
