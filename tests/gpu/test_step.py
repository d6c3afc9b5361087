"""One GPU: a training step, its kernels, what it waits for, and its checkpoints."""

import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minitron.arch.arch import Arch
from minitron.config.schema import Distill, Parallel, Train
from minitron.distillation.signal import LiveTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.checkpoint import Checkpoints
from minitron.engine.optimizer_state import torch_optimizers
from minitron.engine.parallel import world
from minitron.engine.schedule import forward_only
from minitron.engine.timing import random_model
from minitron.engine.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")]
ARCH = Arch("llama", num_layers=4, hidden_size=128, ffn_hidden_size=256, num_attention_heads=8, num_query_groups=2, kv_channels=64, vocab_size=512,
            max_position_embeddings=512)  # fmt: skip
SETTINGS = Train(steps=10, global_batch_size=8, micro_batch_size=2, seq_length=256, warmup_steps=1, lr=1e-3)
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Megatron's question whether any token counts, the loss, the norm of the gradient
WAITS = 3


def batches():
    tokens = torch.randint(0, ARCH.vocab_size, (8, 257), generator=torch.Generator().manual_seed(1))
    return [Batch(part) for part in tokens.split(2)]


def trained(here, dtype):
    """(trainer, its loss) of a student and a teacher of random weights, the same on every device."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = random_model(ARCH, here, dtype, "torch")
        with torch.no_grad():
            for parameter in model.parameters():  # not by the device's own generator
                parameter.copy_(0.05 * torch.randn(parameter.shape) + (parameter.dim() == 1))
        models.append(model)
    models[0].requires_grad_(False)
    trainer = Trainer(models[1], SETTINGS, here)
    return trainer, distillation_loss(models[1], LiveTeacher(models[0], here), Distill(chunk_tokens=128), here)


def stepped(trainer, loss, count=1):
    """The lines of so many steps."""
    lines = []
    for _ in range(count):
        lines.append(trainer.update(batches(), loss(trainer.step, batches())))
        trainer.step += 1
    return lines


@TYPES
def test_attention_makes_no_matrix_of_the_sequence(dtype):
    """Where only these kernels are allowed, torch refuses what they can't do."""
    with world(Parallel(), "cuda", 1) as here:
        model = random_model(ARCH, here, dtype, "torch")
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            (hidden,) = forward_only(model, [torch.zeros(2, 64, dtype=torch.int64)], here, lambda _, hidden: hidden)
            assert hidden.isfinite().all()
            documents = torch.arange(64)[None].expand(2, -1) // 20
            forward_only(model, [torch.zeros(2, 64, dtype=torch.int64)], here, documents_BS=[documents])


@TYPES
def test_a_step_waits_for_its_figures_alone(dtype):
    with world(Parallel(), "cuda", 1) as here:
        trainer, loss = trained(here, dtype)
        stepped(trainer, loss, 2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                stepped(trainer, loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [f"{warning.filename}:{warning.lineno}" for warning in said if "synchroniz" in str(warning.message)]
        assert len(waits) <= WAITS, waits


def test_the_optimizer_is_torch_s_fused_one_unless_another_brings_its_own():
    with world(Parallel(), "cuda", 1) as here:
        trainer, loss = trained(here, torch.bfloat16)
        stepped(trainer, loss)
        assert all(group["fused"] for inner in torch_optimizers(trainer.optimizer) for group in inner.param_groups)
        for inner in torch_optimizers(trainer.optimizer):
            assert all(state["step"].is_cuda and state["exp_avg"].dtype == torch.float32 for state in inner.state.values())


def test_steps_in_fp32_are_those_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        with world(Parallel(), device, 1) as here:
            found.append(stepped(*trained(here, torch.float32), count=4))
    for ours, theirs in zip(*found, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@TYPES
@pytest.mark.parametrize("in_background", [False, True], ids=["waited_for", "beside"])
def test_a_checkpoint_continues(dtype, in_background, tmp_path):
    with world(Parallel(), "cuda", 1) as here:
        trainer, loss = trained(here, dtype)
        saves = Checkpoints(tmp_path / "checkpoints", in_background=in_background)
        (tmp_path / "checkpoints").mkdir()
        stepped(trainer, loss, 2)
        saves.save(trainer, final=not in_background)
        expected = stepped(trainer, loss, 2)  # beside the writing, where it goes on
        saves.wait(here)
        again, loss = trained(here, dtype)
        assert Checkpoints(tmp_path / "checkpoints").resume(again) and again.step == 2
        found = stepped(again, loss, 2)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
