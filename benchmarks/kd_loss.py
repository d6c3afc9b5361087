"""The distillation loss on the same hidden states and heads: fused, both ways of making gradients, beside what else there is.

unfused: `log_softmax` of both whole [tokens, vocabulary] logits under autograd (minitron.distillation.losses). modelopt: `LogitsKLLoss` of
nvidia-modelopt on whole logits. liger: liger-kernel's chunked loss, which fuses both heads, in chunks of as many tokens; it has no forward KL
of its own: its JSD with beta 0, a mean over tokens, which is multiplied by their number. It is plain torch, and by default compiled by
torch.compile: both are measured, the latter after it is compiled. Each is measured where its package is installed. All give forward KL at
temperature 1, summed over the tokens. floor: not measured but worked out, the time of the four products with the two heads that every one of these
has (both logits, both gradients) at the rate of a large product, which is measured here.

Time is of the loss and its backward pass. Memory is the most that there ever was above the arguments (bytes of torch's tensors on a
CPU, where those of compiled code don't show, its allocator's peak on a GPU), in a first call, so that what the fused loss keeps for later
calls is in it. The error is that of the gradients in the norm, of hidden states and head, against float64 on the first tokens.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from common import ROOT, arguments, matmul_rate, publish

from minitron import engine
from minitron.config.schema import Distill, Parallel
from minitron.distillation.fused import Scratch, linear_distillation
from minitron.distillation.losses import divergence
from minitron.distillation.signal import Head, WholeSignal

Tensor = torch.Tensor
COMPILED = "liger, compiled"
FLOOR = "floor"
SIDES = ("fused, forward", "fused, recompute", "unfused", "modelopt", "liger", COMPILED, FLOOR)
CHECKED = 512  # tokens whose gradients are held against float64


class Inputs(NamedTuple):
    """Hidden states [T, H] and heads [V, H] of both; gradients go to the student's."""

    student_TH: Tensor
    head_VH: Tensor
    teacher_TG: Tensor
    teacher_head_VG: Tensor

    @classmethod
    def random(cls, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> "Inputs":
        """Heads under which logits have a deviation of about 2."""
        generator = torch.Generator(device).manual_seed(1)
        sizes = ((tokens, 1.0), (vocab, 2.0 * hidden**-0.5)) * 2
        made = [torch.randn(rows, hidden, generator=generator, device=device, dtype=dtype).mul_(scale) for rows, scale in sizes]
        return cls(made[0].requires_grad_(), made[1].requires_grad_(), made[2], made[3])

    def first(self, tokens: int) -> "Inputs":
        """The same with fewer tokens."""
        cut = [tensor.detach()[:tokens].clone() for tensor in (self.student_TH, self.teacher_TG)]
        return Inputs(cut[0].requires_grad_(), self.head_VH, cut[1], self.teacher_head_VG)


Loss = Callable[[Inputs], Tensor]


def fused(world: engine.World, gradients: str, chunk_tokens: int) -> Callable[[], Loss]:
    """This project's."""
    settings = Distill(gradients=gradients, chunk_tokens=chunk_tokens)

    def fresh() -> Loss:
        scratch = Scratch()

        def loss(given: Inputs) -> Tensor:
            mask_T = torch.ones(len(given.student_TH), dtype=torch.bool)
            signal = WholeSignal(given.teacher_TG, Head(given.teacher_head_VG))
            return linear_distillation(given.student_TH, Head(given.head_VH), signal, mask_T, world, settings, scratch=scratch).total

        return loss

    return fresh


def unfused(given: Inputs) -> Tensor:
    """Whole logits by autograd."""
    return divergence(given.student_TH @ given.head_VH.t(), given.teacher_TG @ given.teacher_head_VG.t()).sum()


def modelopt() -> Loss:
    """nvidia-modelopt's, on whole logits; it wants [S, B, V] and gives [B, S]."""
    kind = importlib.import_module("modelopt.torch.distill.plugins.megatron").LogitsKLLoss
    # of the model's configuration it reads the layout alone
    kl = kind(SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False, calculate_per_token_loss=False))

    def loss(given: Inputs) -> Tensor:
        result = kl((given.student_TH @ given.head_VH.t())[:, None], (given.teacher_TG @ given.teacher_head_VG.t())[:, None])
        return (result[0] if isinstance(result, tuple) else result).sum()

    return loss


def liger(chunk_tokens: int, compiled: bool) -> Loss:
    """liger-kernel's, which gives means."""
    function = importlib.import_module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction

    def loss(given: Inputs) -> Tensor:
        tokens = len(given.student_TH)
        labels_T = torch.zeros(tokens, dtype=torch.long, device=given.student_TH.device)
        heads = (given.head_VH, given.teacher_TG, given.teacher_head_VG)
        # no biases; weight of the labels 0, of the divergence 1; beta 0; no label is ignored; temperature 1
        return function.apply(given.student_TH, *heads, labels_T, None, None, 0.0, 1.0, 0.0, -100, 1.0, compiled, chunk_tokens) * tokens

    return loss


def exact(given: Inputs) -> list[Tensor]:
    """Gradients to hidden states and head, in float64."""
    student_TH, head_VH = (tensor.detach().double().requires_grad_() for tensor in given[:2])
    log_student, log_teacher = (
        (hidden @ head.t()).log_softmax(-1) for hidden, head in ((student_TH, head_VH), (given.teacher_TG.double(), given.teacher_head_VG.double()))
    )
    loss = torch.nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return list(torch.autograd.grad(loss, (student_TH, head_VH)))


def once(loss: Loss, given: Inputs) -> list[Tensor]:
    """The loss and its gradients."""
    return list(torch.autograd.grad(loss(given), (given.student_TH, given.head_VH)))


def peak_bytes(loss: Loss, given: Inputs) -> int:
    """Most bytes above the arguments during one call."""
    if given.student_TH.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(loss, given)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    sys.path.insert(0, str(ROOT))  # the oracle is the tests'
    from tests.oracles.memory import LiveBytes

    with LiveBytes(list(given)) as live:
        once(loss, given)
    return live.peak


def seconds(loss: Loss, given: Inputs, repeats: int) -> float:
    """Median of the calls after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        once(loss, given)
        if given.student_TH.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def sides(world: engine.World, chunk_tokens: int) -> dict[str, Callable[[], Loss]]:
    """What is compared: each made anew for each measurement."""
    return {
        "fused, forward": fused(world, "forward", chunk_tokens),
        "fused, recompute": fused(world, "recompute", chunk_tokens),
        "unfused": lambda: unfused,
        "modelopt": modelopt,
        "liger": lambda: liger(chunk_tokens, compiled=False),
        COMPILED: lambda: liger(chunk_tokens, compiled=True),
    }


def measure(world: engine.World, shape: tuple[int, int, int], dtype: str, chunk_tokens: int, repeats: int, names: list[str]) -> list[tuple[Any, ...]]:
    """A row for each side of these names."""
    tokens, hidden, vocab = shape
    given = Inputs.random(tokens, hidden, vocab, engine.DTYPES[dtype], world.device)
    few = given.first(CHECKED)
    right, rows = exact(few), []
    for name in names:
        head = f"{tokens} x {hidden} x {vocab}, {dtype}", name
        if name == FLOOR:
            rate = matmul_rate(engine.DTYPES[dtype], world.device)
            rows.append((*head, 4 * 2 * tokens * hidden * vocab / rate, None, None, f"{rate / 1e12:.2f} TFLOP/s in a product"))
            continue
        make = sides(world, chunk_tokens)[name]
        try:
            errors = [((mine.double() - true).norm() / true.norm()).item() for mine, true in zip(once(make(), few), right, strict=True)]
            peak = None if name == COMPILED and world.device.type == "cpu" else peak_bytes(make(), given) / 2**20
            rows.append((*head, seconds(make(), given, repeats), peak, max(errors), ""))
        except ImportError as error:
            rows.append((*head, None, None, None, f"not installed: {error.name}"))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows.append((*head, None, None, None, "out of memory"))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1024,256,8192", "8192,256,8192", "32768,256,8192"], metavar="TOKENS,HIDDEN,VOCAB")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--chunk-tokens", type=int, default=Distill.chunk_tokens, help="tokens of a chunk of the fused losses (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="what is compared (default: all)")
    options = parser.parse_args()
    rows = []
    with engine.world(Parallel(), options.device, 1) as world:
        for dtype in options.dtypes:
            for text in options.shapes:
                tokens, hidden, vocab = map(int, text.split(","))
                rows += measure(world, (tokens, hidden, vocab), dtype, options.chunk_tokens, options.repeats, options.sides)
    columns = {"tokens x hidden x vocabulary": "<", "side": "<", "seconds": ".3f", "peak MiB": ",.0f", "gradient error": ".1e", "": ""}
    notes = [
        f"seconds: median of {options.repeats} calls, loss and gradients, after one that is not counted; chunks of {options.chunk_tokens} tokens",
        "peak: above the arguments, in a first call; gradients are in it",
        f"gradient error: against float64, {CHECKED} tokens, the larger of hidden states' and head's; in bf16 the gradients themselves are rounded",
    ]
    publish("Forward KL from hidden states and heads, with gradients", columns, rows, notes, options.json)


if __name__ == "__main__":
    main()
