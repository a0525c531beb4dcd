"""What both trainings use: steps as CUDA graphs, schedules by the clock."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seed(number: int) -> None:
    """Seed PyTorch and choose its fast settings."""
    torch.manual_seed(number)
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)


class Clock:
    """Time spent of a budget in seconds."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s, self.start = budget_s, time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def fraction(self) -> float:
        return min(1.0, self.elapsed() / self.budget_s)

    def over(self) -> bool:
        return self.elapsed() >= self.budget_s


def cosine(fraction: float, warm: float = 0.02, floor: float = 0.02) -> float:
    """A factor for the learning rate: a short rise, then half a cosine."""
    if fraction < warm:
        return (fraction + 1e-3) / warm
    return floor + (1 - floor) * (1 + math.cos(math.pi * fraction)) / 2


def optimizer(parameters: list[Tensor], lr: float, betas=(0.9, 0.99), decay=0.01):
    """AdamW whose learning rate is a tensor, so that a graph can read it."""
    on_gpu = parameters[0].is_cuda
    rate = torch.tensor(lr, device=parameters[0].device) if on_gpu else lr
    return torch.optim.AdamW(
        parameters, rate, betas, weight_decay=decay, fused=on_gpu, capturable=on_gpu
    )


def set_rate(opt: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate in place."""
    for group in opt.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# Parts of a training's time, and how high the rate is at their begin. The mean of what
# the later ones end with is used: alike in the main, each with other errors.
ROUNDS = ((0.4, 1.0), (0.3, 0.7), (0.3, 0.7))


class Average:
    """A moving average of parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.live = list(module.parameters())
        self.values = [p.detach().clone() for p in self.live]
        self.decay = decay
        self.kept: list[list[Tensor]] = []

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(
            self.values, [p.detach() for p in self.live], 1 - self.decay
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their averages."""
        for p, value in zip(self.live, self.values, strict=True):
            keep = p.detach().clone()
            p.copy_(value)
            value.copy_(keep)

    def rounds(
        self, budget_s: float, first: int = 0, after: Callable[[], None] = int
    ) -> Iterator[float]:
        """A factor for the learning rate, as often as there is time.

        It falls in several rounds, from whose ends `settle` makes the parameters;
        `after` is called at the end of each. Those before `first` are left out.
        """
        for share, height in ROUNDS[first:]:
            clock = Clock(share * budget_s)
            while not clock.over():
                yield height * cosine(clock.fraction())
            self.kept.append([value.clone() for value in self.values])
            after()

    @torch.no_grad()
    def settle(self) -> None:
        """Set the parameters to the mean of the averages after the later rounds."""
        for p, *values in zip(self.live, *self.kept[1 - len(ROUNDS) :], strict=True):
            p.copy_(torch.stack(values).mean(0))


def captured(step: Callable[[], Tensor], warm_up: int = 3) -> Callable[[], Tensor]:
    """A step as a CUDA graph; on a CPU the step itself."""
    if not torch.cuda.is_available():
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
