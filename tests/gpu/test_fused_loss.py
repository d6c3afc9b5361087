"""One GPU: the fused loss and its gradients against float64 autograd over whole logits."""

import itertools

import pytest
import torch

from minitron.config.schema import Distill, Parallel
from minitron.distillation.fused import linear_distillation
from minitron.distillation.signal import Head, WholeSignal
from minitron.engine.parallel import world
from tests.oracles.distillation import logits, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")]

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, SOFTCAP = 200, 128, 160, 4096, 20.0


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
def test_loss_and_gradients_are_those_of_whole_logits(dtype, allowed):
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = ((TOKENS, HIDDEN, 1.0), (VOCAB, HIDDEN, 0.2), (TOKENS, TEACHER_HIDDEN, 1.0), (VOCAB, TEACHER_HIDDEN, 0.2))
    student, head, teacher, teacher_head = (
        (scale * torch.randn(rows, width, generator=generator, device="cuda")).to(dtype) for rows, width, scale in sizes
    )
    mask = torch.rand(TOKENS, generator=generator, device="cuda") > 0.3
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator, device="cuda")
    with world(Parallel(), "cuda", 1) as here:
        for kind, top_k, gradients in itertools.product(("forward_kl", "reverse_kl", "jsd"), (None, 50), ("forward", "recompute")):
            settings = Distill(kind, temperature=1.5, top_k=top_k, cross_entropy=0.4, gradients=gradients, chunk_tokens=64)
            exact = [tensor.double().requires_grad_() for tensor in (student, head)]
            right = reference(logits(*exact, 1.0, SOFTCAP), logits(teacher, teacher_head, 1.0, SOFTCAP), mask, settings, labels)[0]
            mine = [tensor.clone().requires_grad_() for tensor in (student, head)]
            signal = WholeSignal(teacher, Head(teacher_head, softcap=SOFTCAP))
            found = linear_distillation(mine[0], Head(mine[1], softcap=SOFTCAP), signal, mask, here, settings, labels).total
            pairs = [(found, right), *zip(torch.autograd.grad(found, mine), torch.autograd.grad(right, exact), strict=True)]
            for ours, expected in pairs:
                assert (ours.double() - expected).norm() < allowed * expected.norm(), (kind, top_k, gradients)
