"""No part of a step waits for the GPU unasked. There is none here: tensors of the meta device stand in for its own."""

import dataclasses
import itertools

import pytest
import torch
from megatron.core.optimizer import clip_grads

from minitron.arch.arch import Arch
from minitron.config.schema import Distill
from minitron.distillation.fused import Gradients, Scratch, Work
from minitron.distillation.signal import Head, LiveTeacher, TopSignal, WholeSignal
from minitron.distillation.step import distillation_loss
from minitron.distillation.topk import top_signal
from minitron.engine.batch import Batch, to_device
from minitron.engine.checkpoint import empty_model
from minitron.engine.probing import Scored, losses_without
from minitron.engine.schedule import forward_only
from minitron.engine.scoring import language_model_score
from minitron.engine.together import l2_norm, scale, together
from minitron.importance.hooks import Probes
from tests.oracles.waiting import GPU, Waits

ARCH = Arch("llama", num_layers=3, hidden_size=24, ffn_hidden_size=20, num_attention_heads=6, num_query_groups=3, kv_channels=4, vocab_size=61,
            max_position_embeddings=64, scaled_embeddings=True)  # fmt: skip
TYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def there(alone):
    """The world of one rank, whose device is a GPU."""
    return dataclasses.replace(alone, device=GPU)


def test_what_waits_is_noted():
    with Waits() as noted:
        x, host = torch.ones(4, device=GPU), torch.arange(2)
        harmless = [torch.where(x > 0, x, 0.0), to_device(host, GPU), x * torch.tensor(2.0), x.index_fill(0, to_device(host, GPU), 0.0)]
        assert noted.found == [] and all(one.device == GPU for one in harmless)
        torch.where(x > 0, x, torch.tensor(0.0))
        host.to(GPU)
        for read in (lambda: x.cpu(), lambda: x.sum().item(), lambda: x.nonzero()):
            with pytest.raises(RuntimeError):
                read()
        x.index_put((host,), x[:2])
    expected = ["where.self", "_to_copy.default", "_to_copy.default", "_local_scalar_dense.default", "nonzero.default", "index_put.default"]
    assert noted.found == [f"aten.{name}" for name in expected]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_fused_loss(dtype, there):
    with Waits() as noted:
        generator = {"dtype": dtype, "device": GPU}
        mask, labels = torch.arange(40) % 3 > 0, torch.zeros(40, dtype=torch.int64, device=GPU)
        top = TopSignal(torch.zeros(40, 5, dtype=torch.int64, device=GPU), torch.zeros(40, 5, device=GPU), torch.zeros(40, device=GPU))
        for kind, (signal, top_k), softcap in itertools.product(
            ("forward_kl", "reverse_kl", "jsd"), (("whole", None), ("whole", 7), ("top", None)), (None, 30.0)
        ):
            student, weight = (torch.empty(rows, 24, **generator) for rows in (40, 61))
            said = top if signal == "top" else WholeSignal(torch.empty(40, 32, **generator), Head(torch.empty(61, 32, **generator), softcap=softcap))
            settings = Distill(kind, temperature=1.5, top_k=top_k, cross_entropy=0.4, chunk_tokens=64)
            work, gradients = (
                Work(Head(weight, softcap=softcap), said, mask.to(GPU, non_blocking=True), mask, labels, settings, there, Scratch()),
                Gradients(student, weight),
            )
            assert work.values(student, gradients).total.device == gradients.head_vH.device == GPU
        top_signal(torch.empty(40, 24, **generator), Head(torch.empty(61, 24, **generator)), 7, 2.0, there, 16)
    assert noted.found == []


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_passes_of_models(dtype, there):
    with Waits() as noted:
        model = empty_model(ARCH, there, dtype).requires_grad_(False)  # no derivatives are taken of what only pretends
        tokens, counted = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 8, dtype=torch.bool)
        documents = torch.zeros(2, 8, dtype=torch.int64)
        (hidden,) = forward_only(model, [tokens[:, :-1]], there, lambda _, hidden: hidden, documents_BS=[documents])
        assert hidden.device == GPU and hidden.dtype == dtype
        loss = distillation_loss(model, LiveTeacher(model, there), Distill(chunk_tokens=4), there)(0, [Batch(tokens, counted)])
        total, count, _ = loss.last(0, hidden)
        assert total.device == count.device == GPU
        for over_tokens, over_samples in (("mean", "l2"), ("l2", "var"), ("var", "mean")):
            probes = Probes(model, there, over_tokens, over_samples, 8)
            with probes.attached():
                forward_only(model, [tokens[:, :-1]] * 2, there, watch=probes)
        sums, _ = losses_without(model, [Scored(tokens, counted, torch.zeros(2, dtype=torch.int64))], there, [range(1), range(1, 2), range(3, 3)], 1)
        assert sums.device == GPU and noted.found == []
        with pytest.raises(RuntimeError, match="meta"):  # of which the result can't be read, once it is there
            language_model_score(model, [(tokens, counted), (tokens, counted[:, 0])], there)
    assert noted.found == ["aten._to_copy.default"]


def test_gradients_are_measured_and_scaled_as_megatron_does(alone):
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (7, 300, 5000)]
    usual = clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl
    expected = usual[0](0, None, [gradients], False)[0]
    scaled = [gradient * 0.3 for gradient in gradients]
    with together():
        assert (clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl) == (l2_norm, scale)
        assert torch.equal(l2_norm(0, None, [gradients], False)[0], expected)
        scale(0, None, [gradients, gradients], 0.3)
        scale(0, None, [[], []], 0.3)
    assert all(map(torch.equal, gradients, scaled))
    assert (clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl) == usual
    with Waits() as noted:
        norm, _ = l2_norm(0, None, [[torch.ones(size, device=GPU) for size in (7, 300)]], False)
        assert norm.device == GPU
    assert noted.found == []


def test_kernels_of_a_gpu_are_taken_where_they_are(monkeypatch):
    monkeypatch.setattr(clip_grads, "l2_norm_impl", kernel := lambda *unused: None)
    with together():
        assert clip_grads.l2_norm_impl is kernel
