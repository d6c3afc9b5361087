"""What other papers rank units by, computed on a plain `transformers` Llama, in the product's own form: a score for every unit of every axis
(importance/scores.py), which its `select` reads. Reimplementations from the papers and from what their authors' code does; none of it is theirs.

Legend: N samples, S tokens of a sample, T all tokens, I what goes into a matrix, O what comes out, H hidden, D channels of a head.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minitron import engine
from minitron.importance.scores import magnitude_scores
from minitron.weights.load import load
from minitron.weights.source import open_folder

Tensor = torch.Tensor
Scores = dict[str, Tensor]
BI = "layers.bi"


def matrices(model: Any, layer: int) -> dict[str, Any]:
    """The matrices of a block, by the last word of their names."""
    block = model.model.layers[layer]
    return {name.split(".")[-1]: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}


def taylor(model: Any, samples_NS: Tensor) -> Scores:
    """LLM-Pruner's importance of each weight (Ma et al., arXiv 2305.11627, first order): |weight x gradient|, by parameter.

    The gradient is that of the mean next-token loss over all samples at once, as the authors' code takes it. [as the parameters]
    """
    model.zero_grad()
    for sample_S in samples_NS:
        (model(sample_S[None], labels=sample_S[None]).loss / len(samples_NS)).backward()
    found = {name: (tensor.detach() * tensor.grad).abs() for name, tensor in model.named_parameters()}
    model.zero_grad()
    return found


def coupled(model: Any, weights: Mapping[str, Tensor], world: engine.World) -> Scores:
    """The sum of what each weight counts over all weights that go with a unit; of a layer, over all of the layer's.

    What belongs to a unit is what the product's table of axes says: weights whose square is what they count go through its criterion of magnitude.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, state_dict={name: value.sqrt() for name, value in weights.items()})
        roots = load(open_folder(Path(scratch), "weights"), world, torch.float32)
    return {name: score.square() for name, score in magnitude_scores(roots, world).items()}


class Recorder:
    """One pass over samples in which sums are kept for all criteria that read activations. `watch(model)` puts the hooks on.

    `squares[layer, matrix]` and `squares["head"]`: of what goes into a matrix, summed over all tokens [I]. `means[layer, where]`: squares, summed
    over samples, of the mean over a sample's tokens of |x|, `where` being a norm, "heads" or "ffn" [H, I]. `cosines`: between what goes into a block
    and what comes out, summed over tokens, by layer. `spread` [H, H]: x^T x of what every norm reads, each token at length sqrt(H).
    """

    def __init__(self, model: Any) -> None:
        self.model, self.layers, self.tokens = model, range(model.config.num_hidden_layers), 0
        self.squares: dict[Any, Tensor] = {}
        self.means: dict[Any, Tensor] = {}
        self.cosines = torch.zeros(len(self.layers), dtype=torch.float64)
        self.spread = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64)

    def record(self, samples_NS: Tensor) -> Recorder:
        """Read the samples one by one."""
        handles = [module.register_forward_hook(hook) for module, hook in self._points()]
        try:
            with torch.no_grad():
                for sample_S in samples_NS:
                    self.model(sample_S[None])
                    self.tokens += len(sample_S)
        finally:
            for handle in handles:
                handle.remove()
        return self

    def influence(self) -> Tensor:
        """Of every layer 1 - the mean cosine: ShortGPT's Block Influence (Men et al., arXiv 2403.03853)."""
        return 1 - self.cosines / self.tokens

    def _points(self) -> list[tuple[Any, Callable[..., None]]]:
        points: list[tuple[Any, Callable[..., None]]] = []
        for layer in self.layers:
            block = self.model.model.layers[layer]
            for name, matrix in matrices(self.model, layer).items():
                points.append((matrix, self._square((layer, name))))
            for name, norm in (("attention", block.input_layernorm), ("mlp", block.post_attention_layernorm)):
                points += [(norm, self._mean((layer, name), output=True)), (norm, self._spread)]
            points += [(block.self_attn.o_proj, self._mean((layer, "heads"))), (block.mlp.down_proj, self._mean((layer, "ffn")))]
            points.append((block, self._cosine(layer)))
        return [*points, (self.model.model.norm, self._spread), (self.model.lm_head, self._square("head"))]

    def _square(self, key: Any) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            add(self.squares, key, args[0].flatten(0, -2).square().sum(dim=0).double())

        return hook

    def _mean(self, key: Any, output: bool = False) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            values_SI = (out if output else args[0])[0]
            add(self.means, key, values_SI.abs().mean(dim=0).double().square())

        return hook

    def _cosine(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            self.cosines[layer] += torch.nn.functional.cosine_similarity(args[0], after, dim=-1).double().sum()

        return hook

    def _spread(self, module: Any, args: Any, output: Any) -> None:
        read_TH = args[0].flatten(0, -2)
        read_TH = read_TH * read_TH.square().mean(dim=-1, keepdim=True).rsqrt()
        self.spread += (read_TH.T @ read_TH).double()


def add(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    """Add to what is kept under a key."""
    sums[key] = sums[key] + value if key in sums else value


def in_heads(columns_I: Tensor, model: Any) -> Tensor:
    """[heads, D]."""
    return columns_I.view(model.config.num_attention_heads, -1)


def with_groups(scores: Scores, model: Any) -> Scores:
    """A KV group counts what its query heads do; everything in fp32, as score files have it."""
    groups = model.config.num_key_value_heads
    named = {name.replace("heads", "groups"): value.view(groups, -1).sum(dim=1) for name, value in scores.items() if name.startswith("heads")}
    return {name: value.float() for name, value in (scores | named).items()}


def wanda(recorder: Recorder) -> Scores:
    """|weight| x the L2 norm of what it is multiplied with (Wanda, Sun et al., arXiv 2306.11695), summed over the columns of a unit: as its
    structured form that FLAP compares with (Wanda-sp, An et al., arXiv 2312.11983) ranks neurons and heads, by the matrix that reads them.

    It cuts no channels of the residual stream and no layers. Here a channel counts its columns in every matrix that reads the stream, the head
    too, and layers are left to Block Influence.
    """
    model, norms = recorder.model, {key: squares.sqrt() for key, squares in recorder.squares.items()}

    def columns(matrix: Any, key: Any) -> Tensor:
        return matrix.weight.detach().double().abs().sum(dim=0) * norms[key]

    hidden, scores = columns(model.lm_head, "head"), {}
    for layer in recorder.layers:
        found = {name: columns(matrix, (layer, name)) for name, matrix in matrices(model, layer).items()}
        scores[f"ffn.{layer}"] = found["down_proj"]
        scores[f"heads.{layer}"] = in_heads(found["o_proj"], model).sum(dim=1)
        hidden = hidden + sum(value for name, value in found.items() if name not in ("down_proj", "o_proj"))
    return with_groups({"hidden": hidden, BI: recorder.influence(), **scores}, model)


def modelopt(recorder: Recorder) -> Scores:
    """The formula by which nvidia-modelopt 0.47 ranks units for Minitron, computed anew: per channel the mean of |x| over a sample's tokens, squared,
    summed over samples, root. Hidden: sum over the norms of the blocks, without the final one. Heads: the L2 norm of their channels' scores.
    Layers: 1 - the mean cosine between what goes in and what comes out."""
    model, roots = recorder.model, {key: sums.sqrt() for key, sums in recorder.means.items()}
    scores: Scores = {"hidden": sum(roots[layer, name] for layer in recorder.layers for name in ("attention", "mlp"))}  # type: ignore[dict-item]
    for layer in recorder.layers:
        scores[f"ffn.{layer}"] = roots[layer, "ffn"]
        scores[f"heads.{layer}"] = in_heads(roots[layer, "heads"], model).norm(dim=1)
    return with_groups({**scores, BI: recorder.influence()}, model)
