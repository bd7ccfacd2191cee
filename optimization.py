"""AdamW groups, the learning-rate schedule, the guarded update and the moving average of weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def lr_at(step: int, total: int, peak: float, warmup_pct: float, min_pct: float) -> float:
    """Learning rate of step 0 .. total - 1: linear warm-up, then half a cosine down to `min_pct` of the peak."""
    warmup = max(1, round(total * warmup_pct / 100)) if warmup_pct else 0
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    low = min_pct / 100
    return peak * (low + (1 - low) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms, tokens, temperatures and the word table (rare words would shrink) do not."""
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in trained if p.ndim < 2 or id(p) in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


class Optimizer:
    """Fused AdamW whose update is masked on the device when a gradient is not finite: no host synchronisation.

    `flags` of the steps come back as device tensors; the caller reads them a step late.
    """

    def __init__(self, module: nn.Module, weight_decay: float, grad_clip_norm: float, scaler_device: str | None):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.clip = grad_clip_norm or math.inf
        # betas as for contrastive training (arXiv:2303.15343): 0.95 follows a loss whose scale changes faster
        self.adamw = torch.optim.AdamW(parameter_groups(module, weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(scaler_device) if scaler_device else None

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def allocate(self) -> None:
        """Create the moments before the first step, so that running out of memory never leaves a step half done."""
        for p in self.parameters:
            state = self.adamw.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """Clip and update, or leave everything as it was if the gradient is not finite; gradients are freed.

        Returns the gradient's norm before clipping and whether it was finite, both on the device.
        """
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self.scaler is not None:
            self.scaler.unscale_(self.adamw)
        with_gradient = [p for p in self.parameters if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(with_gradient, self.clip)
        finite = norm.isfinite()
        # not scaler.step: it takes a norm that overflows, of gradients that do not, for a good step
        self.adamw.grad_scale, self.adamw.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        self.adamw.step()
        if self.scaler is not None:
            self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        return norm, finite

    def state_dict(self) -> dict[str, object]:
        return {"adamw": self.adamw.state_dict(), "scaler": self.scaler.state_dict() if self.scaler else {}}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


class MovingAverage:
    """Exponential moving average of a module's parameters, in float32 on their device (arXiv:1803.05407's relative).

    The decay warms up as (1 + n) / (10 + n), so that short runs do not remember their initial weights.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.names = [name for name, _ in module.named_parameters()]
        self.values = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1 - decay)

    def swap(self, module: nn.Module) -> None:
        """Exchange the averaged weights with those of the module; a second call restores them."""
        with torch.no_grad():
            for value, p in zip(self.values, module.parameters(), strict=True):
                kept = p.detach().clone()
                p.copy_(value)
                value.copy_(kept)

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "values": dict(zip(self.names, self.values, strict=True))}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state["values"][name])
