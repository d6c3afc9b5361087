"""One GPU: what is said of a rank's memory, against what torch allocated there."""

import dataclasses

import pytest
import torch

from minitron.config.schema import Distill, Parallel, Train
from minitron.engine.parallel import world
from minitron.launching.memory import memory
from tests.multirank.ranks import Layout
from tests.oracles.resident import STUDENT, TEACHER, Case, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")]
SETTINGS = Train(steps=10, seq_length=1024, micro_batch_size=4, global_batch_size=8, warmup_steps=1)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_is_said_is_within_10_percent_of_what_torch_allocated(recompute):
    """Above the workspace of cuBLAS, which is allocated as tensors are, and is the process's."""
    settings = dataclasses.replace(SETTINGS, recompute=recompute)
    cfg = dataclasses.replace(Case(Layout()).config(), dtype="bf16", device="cuda", spec="torch", train=settings, distill=Distill(chunk_tokens=512))
    with world(Parallel(), "cuda", 1) as here:
        sizes = {"hidden_size": 32, "ffn_hidden_size": 32, "kv_channels": 4, "vocab_size": 64}
        train(here, STUDENT.replace(**sizes), TEACHER.replace(**sizes), cfg, None)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(here, STUDENT, TEACHER, cfg, None)
        taken = torch.cuda.max_memory_allocated() - before
    (said,) = memory(STUDENT, TEACHER, cfg, 1)
    assert said.total - said.parts["runtime"] == pytest.approx(taken, rel=0.1)
