"""Other papers' criteria against sums made by hand on a tiny model, the rotation against the model that it must not change, the tables."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers import __main__ as peers
from benchmarks.peers import criteria
from benchmarks.peers.figures import above, common, interval, overlap_table, table
from benchmarks.peers.rotation import components, rotated, save_rotated
from minitron.arch.families import from_hf
from minitron.importance.scores import expected_shapes, random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.weights.load import load
from minitron.weights.save import gathered
from minitron.weights.source import open_folder
from tests.oracles.importance import Recorded
from tests.oracles.models import BIASES, UNTIED, hf_model, save_model, tokens_of

SAMPLES = tokens_of(61, 5, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tied", 4)


@pytest.fixture(scope="module")
def exact(folder):
    """The model in float64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def recorder(folder):
    return criteria.Recorder(hf_model(folder)).record(SAMPLES)


def close(found, expected, tolerance=1e-5):
    """Whether both have the same names and shapes and are equal but for rounding."""
    assert found.keys() == expected.keys()
    shapes = [name for name in found if tuple(found[name].shape) != tuple(expected[name].shape)]
    errors = {name: np.abs(np.asarray(found[name], dtype=np.float64) / np.asarray(expected[name]) - 1).max() for name in found if name not in shapes}
    assert shapes == [] and {name: error for name, error in errors.items() if not error < tolerance} == {}
    return True


def with_groups(scores, config):
    heads = {name: score for name, score in scores.items() if name.startswith("heads")}
    return scores | {
        name.replace("heads", "groups"): np.asarray(score).reshape(config.num_key_value_heads, -1).sum(axis=1) for name, score in heads.items()
    }


def test_taylor_is_how_much_the_loss_moves_with_a_weight(exact):
    found = criteria.taylor(exact, SAMPLES)
    parameters = dict(exact.named_parameters())
    assert found.keys() == parameters.keys()

    def loss():
        logits = exact(SAMPLES).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), SAMPLES[:, 1:].flatten()).item()

    step = 2e-3  # transformers computes norms in fp32 whatever the type of the weights
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.3.self_attn.k_proj.weight", "model.norm.weight"):
        weights, values = parameters[name].data.view(-1), found[name].view(-1)
        for index in values.argsort()[-2:].tolist():
            before, losses = weights[index].item(), []
            for sign in (1, -1):
                weights[index] = before + sign * step
                losses.append(loss())
            weights[index] = before
            assert values[index].item() == pytest.approx(abs(before * (losses[0] - losses[1]) / (2 * step)), rel=5e-3)


def test_a_unit_counts_all_weights_that_go_with_it(folder, alone):
    model = hf_model(folder)
    values = {name: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3)) for name, tensor in model.named_parameters()}
    config, plain = model.config, {name: value.double().numpy() for name, value in values.items()}
    expected = {"hidden": plain["model.embed_tokens.weight"].sum(axis=0) + plain["model.norm.weight"]}
    layers = []
    for layer in range(config.num_hidden_layers):
        mine = {name.split(".")[-2]: value for name, value in plain.items() if f".layers.{layer}." in name}
        expected[f"ffn.{layer}"] = mine["gate_proj"].sum(axis=1) + mine["up_proj"].sum(axis=1) + mine["down_proj"].sum(axis=0)
        queries = (mine["q_proj"].sum(axis=1) + mine["o_proj"].sum(axis=0)).reshape(-1, config.head_dim).sum(axis=1)
        keys = (mine["k_proj"].sum(axis=1) + mine["v_proj"].sum(axis=1)).reshape(-1, config.head_dim).sum(axis=1)
        expected[f"heads.{layer}"] = queries
        expected[f"groups.{layer}"] = queries.reshape(len(keys), -1).sum(axis=1) + keys
        written = mine["o_proj"].sum(axis=1) + mine["down_proj"].sum(axis=1) + mine["input_layernorm"] + mine["post_attention_layernorm"]
        expected["hidden"] = expected["hidden"] + written + sum(mine[f"{name}_proj"].sum(axis=0) for name in ("q", "k", "v", "gate", "up"))
        layers.append(sum(value.sum() for value in mine.values()))
    assert close(criteria.coupled(model, values, alone), expected | {"layers.bi": np.array(layers)})


def test_wanda_is_weights_times_what_they_are_multiplied_with(folder, recorder):
    model, read = hf_model(folder), {}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in linear.items():
        module.register_forward_pre_hook(lambda _, args, name=name: read.setdefault(name, []).append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(SAMPLES)
    counted = {name: (module.weight.abs() * torch.cat(read[name]).norm(dim=0)).detach().double().numpy() for name, module in linear.items()}
    config, expected = model.config, {"hidden": counted["lm_head"].sum(axis=0)}
    for layer in range(config.num_hidden_layers):
        mine = {name.split(".")[-1]: value for name, value in counted.items() if f".layers.{layer}." in name}
        expected[f"ffn.{layer}"] = mine["down_proj"].sum(axis=0)
        expected[f"heads.{layer}"] = mine["o_proj"].sum(axis=0).reshape(-1, config.head_dim).sum(axis=1)
        expected["hidden"] = expected["hidden"] + sum(mine[f"{name}_proj"].sum(axis=0) for name in ("q", "k", "v", "gate", "up"))
    assert close(criteria.wanda(recorder), with_groups(expected, config) | {"layers.bi": Recorded(folder, SAMPLES).scores("l2", "mean")["layers.bi"]})


def test_modelopts_formula_on_activations_recorded_whole(folder, recorder):
    recorded = Recorded(folder, SAMPLES)
    config = recorded.config

    def per_channel(name):
        return np.sqrt((np.abs(recorded.values[name]).mean(axis=1) ** 2).sum(axis=0))

    layers = range(config.num_hidden_layers)
    expected = {"hidden": sum(per_channel(f"norm.{layer}.{part}") for layer in layers for part in ("attention", "mlp"))}
    for layer in layers:
        expected[f"ffn.{layer}"] = per_channel(f"ffn.{layer}")
        expected[f"heads.{layer}"] = np.linalg.norm(per_channel(f"o_proj.{layer}").reshape(-1, config.head_dim), axis=1)
    found, ours = criteria.modelopt(recorder), recorded.scores("l2", "mean")
    assert close(found, with_groups(expected, config) | {"layers.bi": ours["layers.bi"]})
    # where its formula is the paper's, so that the product's is the same: neurons, and ShortGPT's Block Influence
    same = [name for name in found if name.startswith("ffn")] + ["layers.bi"]
    assert close({name: found[name] for name in same}, {name: ours[name] for name in same})
    assert found.keys() == expected_shapes(open_folder(folder, "model.path").arch).keys()


@pytest.mark.parametrize("changes", [{}, UNTIED], ids=["tied", "untied"])
def test_a_rotated_model_computes_the_same(changes, tmp_path):
    plain = hf_model(save_model(tmp_path / "plain", 6, **changes))
    _, components_HH = components(criteria.Recorder(plain).record(SAMPLES).spread)
    save_rotated(plain, components_HH, plain.config.hidden_size, tmp_path / "turned")
    turned = hf_model(tmp_path / "turned")
    with torch.no_grad():
        expected, found = plain(SAMPLES).logits, turned(SAMPLES).logits
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, turned.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_components_come_in_the_order_of_what_norms_put_out(folder, recorder):
    recorded = Recorded(folder, SAMPLES)
    model = hf_model(folder)
    read = []
    for number, layer in enumerate(model.model.layers):
        for part, norm in (("attention", layer.input_layernorm), ("mlp", layer.post_attention_layernorm)):
            read.append(recorded.values[f"norm.{number}.{part}"] / norm.weight.detach().double().numpy())
    read.append(recorded.values["norm.last"] / model.model.norm.weight.detach().double().numpy())
    stacked_TH = np.concatenate([values.reshape(-1, values.shape[-1]) for values in read])
    variances_H, components_HH = components(recorder.spread)
    assert (variances_H.diff() <= 0).all()
    along_H = ((stacked_TH @ components_HH.numpy()) ** 2).sum(axis=0)
    np.testing.assert_allclose(along_H, variances_H.numpy(), rtol=1e-3, atol=1e-4 * along_H[0])
    np.testing.assert_allclose(np.sort(np.linalg.svd(stacked_TH, compute_uv=False) ** 2)[::-1], along_H, rtol=1e-3, atol=1e-4 * along_H[0])


def test_the_product_cuts_the_last_components(folder, recorder, tmp_path, alone):
    model, width = hf_model(folder), 40
    _, components_HH = components(recorder.spread)
    save_rotated(model, components_HH, width, tmp_path / "turned")
    source = open_folder(tmp_path / "turned", "model.path")
    target = source.arch.replace(hidden_size=width)
    scores = random_scores(source.arch, 1) | {"hidden": torch.arange(48, 0, -1.0)}
    cut = dict(gathered(reslice(load(source, alone, torch.float32), select(scores, source.arch, target), target, alone), alone))
    whole = rotated({name: tensor.detach() for name, tensor in model.named_parameters()}, components_HH, width)
    assert cut.keys() == whole.keys()
    for name, tensor in cut.items():
        rows = width if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")) else len(whole[name])
        expected = whole[name][:rows] if whole[name].dim() == 1 or rows == width else whole[name][:, :width]
        torch.testing.assert_close(tensor, expected.float())
    # a cut norm divides by the root of the mean square over the original width
    states = torch.cat([torch.randn(3, width), torch.zeros(3, 48 - width)], dim=1)
    original = torch.nn.functional.rms_norm(states, (48,), eps=0)[:, :width]
    torch.testing.assert_close(torch.nn.functional.rms_norm(states[:, :width], (width,), cut["model.norm.weight"], eps=0), original)


def test_what_a_rotation_can_not_be_folded_into_is_refused(tmp_path):
    model = hf_model(save_model(tmp_path / "biases", 7, **BIASES))
    with pytest.raises(ValueError, match=r"bias: only a Llama without biases is rotated here"):
        rotated({name: tensor.detach() for name, tensor in model.named_parameters()}, torch.eye(48, dtype=torch.float64), 48)


def test_all_ways_keep_about_as_many_parameters():
    smollm2 = from_hf(
        {
            "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        },
        "x",
    )  # fmt: skip
    shapes = peers.SETUPS["smollm2_135m"].shapes
    assert {arm.shape for arm in peers.ARMS.values()} == shapes.keys() == peers.SETUPS["stories260k"].shapes.keys()
    counts = {}
    for name, sizes in shapes.items():
        groups = sizes.get("num_query_groups", 3)
        target = smollm2.replace(**sizes, num_attention_heads=3 * groups, share_embeddings_and_output_weights=name != "components")
        counts[name] = target.num_parameters() / 102.7e6
    assert {name: count for name, count in counts.items() if not 0.99 < count < 1.001} == {}


def test_intervals_and_differences():
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.30265 / 3**0.5, rel=1e-5))
    assert interval([1.5]) == (1.5, None)
    one, other = ({"distilled": {seed: {"valid": loss} for seed, loss in losses.items()}} for losses in ({"1": 3.0, "2": 4.0}, {"2": 4.5, "3": 9.0}))
    assert above(other, one, "valid") == [0.5]


def test_kept_sets_are_compared_layer_by_layer():
    arch = from_hf({"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "vocab_size": 9, "max_position_embeddings": 8, "rms_norm_eps": 1e-5}, "x")  # fmt: skip
    target = arch.replace(num_layers=2, hidden_size=4, ffn_hidden_size=3, num_attention_heads=2)
    scores = {name: score * 0 for name, score in random_scores(arch, 1).items()} | {"layers.bi": torch.tensor([1.0, 2.0, 3.0])}
    other = scores | {"layers.bi": torch.tensor([2.0, 1.0, 3.0]), "ffn.2": torch.tensor([0.0, 1, 0, 0, 0, 1]), "hidden": torch.arange(8.0)}
    found = common(select(scores, arch, target), select(other, arch, target))
    # layers 1 and 2, and 0 and 2; of layer 2 neurons 0, 1, 2, and 0, 1, 5; channels 0 to 3, and 4 to 7
    assert found == {"layers": [1, 2, 1, 2], "hidden": [0, 4, 0, 4], "ffn": [2, 3, 2, 3], "heads": [2, 2, 2, 2], "groups": [2, 2, 2, 2]}
    assert "| ffn | 2 | 3 | 66.7 % | 2 of 3 |" in overlap_table({"overlap": {"axes": found}})


def test_the_benchmark_goes_on_where_it_was(data_root, stories, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINITRON_TEST_DATA", str(data_root))
    given = [
        "peers",
        "train.steps=3",
        "eval.tokens=1024",
        "calibrate.samples=8",
        "--model",
        "stories260k",
        "--folder",
        str(tmp_path),
        "--seeds",
        "1",
        "--arms",
        "ours",
        "taylor",
        "slicegpt",
    ]
    monkeypatch.setattr(sys, "argv", [*given, "--json", str(tmp_path / "peers.json")])
    peers.main()
    found, said = json.loads((tmp_path / "peers.json").read_text()), capsys.readouterr().out
    assert {name: [*arm["distilled"]] for name, arm in found["arms"].items()} == {name: ["1"] for name in ("ours", "taylor", "slicegpt")}
    assert all(arm["distilled"]["1"]["valid"] < arm["as_cut"]["valid"] for arm in found["arms"].values())
    assert found["overlap"]["axes"]["ffn"][0] == found["overlap"]["axes"]["ffn"][1], "modelopt's formula for neurons is the paper's"
    assert table(found) in said
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("found/*.json")}
    peers.main()
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("found/*.json")} and "measure" not in capsys.readouterr().out


def test_what_the_document_says_of_the_intervals():
    """The sentences below the table in docs/results.md."""
    found = json.loads((Path(__file__).parents[2] / "docs" / "results" / "peers.json").read_text(encoding="utf-8"))
    ends: dict[str, dict[str, tuple[float, float]]] = {text: {} for text in found["texts"]}
    for text, (name, arm) in itertools.product(found["texts"], found["arms"].items()):
        if name != "ours" and len(arm["distilled"]) > 1:
            mean, half = interval(above(arm, found["arms"]["ours"], text))
            ends[text][name] = mean - half, mean + half
    worse = {text: {name for name, (low, _) in one.items() if low > 0} for text, one in ends.items()}
    assert (
        ends.keys() == {"valid", "text_wikitext2"} and {"shortgpt", "taylor", "magnitude", "random", "slicegpt", "ours-width"} <= ends["valid"].keys()
    )
    assert worse["valid"] == ends["valid"].keys() - {"wanda"} and ends["valid"]["wanda"][1] < 0
    assert worse["text_wikitext2"] == ends["text_wikitext2"].keys() - {"wanda", "shortgpt"} and ends["text_wikitext2"]["wanda"][0] < 0
    widths = [found["arms"][name]["distilled"] for name in ("ours-width", "wanda-width")]
    assert all(widths[0][seed]["valid"] < losses["valid"] for seed, losses in widths[1].items())
