"""Muon and AdamW, the learning-rate schedule, the guarded update and the moving average of weights."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimodal.config import StageConfig, TrainingConfig
from trimodal.errors import ConfigError


def freeze(model: nn.Module, row: StageConfig) -> None:
    """Train the parameters whose whole name matches one of the stage's patterns, freeze the others.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    trained = {name for pattern in row.trainable for name in names_of(model, pattern, f"stages.{row.name}.trainable")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def names_of(model: nn.Module, pattern: str, key: str) -> list[str]:
    """Names of parameters that a pattern of the setting `key` matches as a whole.

    Raises:
        ConfigError: there is none.
    """
    names = [name for name, _ in model.named_parameters()]
    if found := [name for name in names if re.fullmatch(pattern, name)]:
        return found
    raise ConfigError(f"{key}: {pattern!r} matches no parameter; names look like {names[0]}, {names[-1]}")


def lr_factors(model: nn.Module, row: StageConfig) -> dict[str, dict[Tensor, float]]:
    """For each pattern of the stage's `lr_factors` the parameters whose whole name it is the first to match, and what
    the stage multiplies the learning rate of each by.

    That is the pattern's factor in the last layer of a tower and in all that stands on towers; each layer below has
    `layer_decay` times the factor of the one above (arXiv:2106.08254).

    Raises:
        ConfigError: a pattern matches no parameter, or none that earlier ones leave.
    """
    key, left = f"stages.{row.name}.lr_factors", dict(model.named_parameters())
    factors: dict[str, dict[Tensor, float]] = {}
    for pattern, given in row.lr_factors.items():
        found = [name for name in names_of(model, pattern, key) if name in left]
        if not found:
            raise ConfigError(f"{key}: all that {pattern!r} matches is matched by earlier patterns, of which the first "
                              "counts; put it before them, or leave it out")
        factors[pattern] = {left.pop(name): given.factor * given.layer_decay**layers_above(model, name)
                            for name in found}
    return factors


def layers_above(model: nn.Module, name: str) -> int:
    """How many layers of its tower lie above a parameter: none above its last block, nor above what is in no tower, and
    all blocks above the embedding of its input."""
    part, _, rest = name.partition(".")
    tower = getattr(model, part)
    if hasattr(tower, "tower"):  # a pretrained one, below layers of our own
        inner = rest.removeprefix("tower.")
        return tower.tower.depth - tower.tower.layer_of(inner) if inner != rest else 0
    if not hasattr(tower, "blocks"):
        return 0
    depth = len(tower.blocks.blocks)
    if block := re.match(r"blocks\.blocks\.(\d+)\.", rest):
        return depth - 1 - int(block[1])
    return 0 if rest.startswith("blocks.norm.") else depth


def lr_at(step: float, total: float, peak: float, warmup_pct: float, min_pct: float) -> float:
    """Learning rate of step 0 .. total - 1: linear warm-up, then half a cosine down to `min_pct` of the peak. Steps may
    lie between whole ones, where a schedule has been stretched."""
    warmup = max(1, round(total * warmup_pct / 100)) if warmup_pct else 0
    if step < warmup:
        return peak * min((step + 1) / warmup, 1.0)
    done = (step - warmup) / max(1, total - warmup)
    low = min_pct / 100
    return peak * (low + (1 - low) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, tokens, temperatures and the word table (rare words would shrink) do not."""
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in trained if p.ndim < 2 or id(p) in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def of_equal_factor(group: dict[str, Any], factors: Mapping[Tensor, float]) -> list[dict[str, Any]]:
    """A group of parameters cut into groups of equal learning-rate factor, which they hold as `lr_factor`."""
    parts: dict[float, list[nn.Parameter]] = {} if group["params"] else {1.0: []}
    for p in group["params"]:
        parts.setdefault(factors.get(p, 1.0), []).append(p)
    return [{**group, "params": parameters, "lr_factor": factor} for factor, parameters in parts.items()]


def block_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trained matrices within transformer blocks: most of a model's weights, and what Muon is made for."""
    return [p for name, p in module.named_parameters() if p.requires_grad and p.ndim == 2 and ".blocks." in f".{name}"]


def orthogonalise(x_KMN: Tensor, dtype: torch.dtype | None) -> Tensor:
    """K matrices, each with all its singular values moved near 1 by four Newton-Schulz steps in `dtype` (None: theirs).

    Two steps at a time multiply an m x n matrix, m <= n, by a function of its Gram matrix, in 2 m^2 (2 n + 5 m)
    operations; one by one they take 2 m^2 (4 n + 2 m). All four at a time would take fewer still, but in bfloat16 the
    Gram matrix, whose singular values are squares, loses the small ones.
    """
    wide = x_KMN.shape[1] <= x_KMN.shape[2]
    y_KMN = x_KMN.to(dtype)
    y_KMN = y_KMN / (y_KMN.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(2):
        y_KMN = _two_steps(y_KMN @ y_KMN.mT) @ y_KMN if wide else y_KMN @ _two_steps(y_KMN.mT @ y_KMN)
    return y_KMN.to(x_KMN.dtype)


def _two_steps(gram_KMM: Tensor) -> Tensor:
    """What two Newton-Schulz steps multiply matrices by, from their Gram matrices."""
    first = _one_step(gram_KMM)
    second = _one_step(first @ (first @ gram_KMM))  # of the Gram matrices after the first
    return second @ first


def _one_step(gram_KMM: Tensor) -> Tensor:
    """a + b G + c G^2, with the coefficients of Jordan et al., "Muon", 2024."""
    a, b, c = 3.4445, -4.7750, 2.0315
    step_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
    step_KMM.diagonal(dim1=1, dim2=2).add_(a)
    return step_KMM


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices (arXiv:2502.16982): rare directions learn as fast as common ones.

    An update has a root mean square of 0.2 times the rate, as AdamW's typically has, so that one learning rate serves
    both; the state is half of AdamW's. As in torch's fused optimizers, a true `found_inf` on the device leaves all as
    it was; torch.optim.Muon has no such mask (benchmarks/muon.py compares them). A step overwrites the gradients.
    """

    MOMENTUM = 0.95
    BATCH_ELEMENTS = 2**24  # matrices of one shape go together, as many as this: bounds the memory of an update
    COPIES = 6  # of a batch of matrices that an update holds at most

    def __init__(self, matrices: list[nn.Parameter] | list[dict[str, Any]], weight_decay: float,
                 dtype: torch.dtype | None):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})
        self.dtype = dtype
        self.found_inf = torch.zeros((), dtype=torch.float32, device=next(_parameters(self)).device)
        for p in _parameters(self):
            self.state[p] = {"momentum": torch.zeros_like(p)}

    def reserve(self) -> None:
        """Take the memory that the largest update needs and leave it to the allocator, so that running out of it
        happens before anything is updated."""
        sizes = [sum(p.numel() for p, _ in batch) for batch in self._batches()]
        if sizes:
            p = self.param_groups[0]["params"][0]
            torch.empty(self.COPIES * max(sizes), dtype=p.dtype, device=p.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for batch in self._batches():
            self._update(batch)

    def _batches(self) -> Iterator[list[tuple[nn.Parameter, int]]]:
        """Matrices of one shape that have a gradient, at most BATCH_ELEMENTS of numbers at a time, of all groups: what
        groups differ in comes last. Each with the number of its group, in ascending order."""
        shapes: dict[torch.Size, list[tuple[nn.Parameter, int]]] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append((p, number))
        for shape, all_of_shape in shapes.items():
            count = max(1, self.BATCH_ELEMENTS // shape.numel())
            for first in range(0, len(all_of_shape), count):
                yield all_of_shape[first:first + count]

    def _update(self, batch: list[tuple[nn.Parameter, int]]) -> None:
        gradients = [p.grad for p, _ in batch if p.grad is not None]
        moments = [self.state[p]["momentum"] for p, _ in batch]
        self._subtract(moments, gradients, self.MOMENTUM - 1, -1.0)
        torch._foreach_lerp_(gradients, moments, self.MOMENTUM)  # Nesterov's; nobody reads the gradients any more
        update_KMN = orthogonalise(torch.stack(gradients), self.dtype)
        scale = 0.2 * max(update_KMN.shape[1:]) ** 0.5
        for number, places in itertools.groupby(range(len(batch)), lambda place: batch[place][1]):
            group, own = self.param_groups[number], list(places)
            self._subtract([batch[place][0] for place in own], [update_KMN[place] for place in own],
                           group["lr"] * scale, group["weight_decay"] / scale)

    def _subtract(self, tensors: list[Tensor], changes: list[Tensor], rate: float, decay: float) -> None:
        """Subtract `rate` times (change + `decay` times tensor) from each tensor, in one pass over memory, unless
        `found_inf`."""
        torch._fused_sgd_(tensors, changes, [], weight_decay=decay, momentum=0.0, lr=rate, dampening=0.0,
                          nesterov=False, maximize=False, is_first_step=False, found_inf=self.found_inf)


class Optimizer:
    """Muon for the matrices of the blocks and fused AdamW for all else, or AdamW alone; the update is masked on the
    device when a gradient is not finite: no host synchronisation.

    `step` returns device tensors, which the caller reads a step late. Whole lists of tensors are updated at a time
    (`torch._foreach_`), since a GPU is done with a small one sooner than the host can ask for the next. Muon's products
    are in bfloat16 where `amp`, the dtype of autocast, is that, and in the parameters' own elsewhere.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, amp: torch.dtype | None = None,
                 scaler_device: str | None = None, factors: Mapping[Tensor, float] | None = None):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.clip = config.grad_clip_norm or math.inf
        self.lr = 0.0  # of the latest step
        matrices = block_matrices(module) if config.optimizer == "muon" else []
        given = {id(p) for p in matrices}
        self.groups = {"adamw": parameter_groups(module, config.weight_decay)}  # as they are saved
        for group in self.groups["adamw"]:
            group["params"] = [p for p in group["params"] if id(p) not in given]
        if matrices:
            self.groups["muon"] = [{"params": matrices, "weight_decay": config.weight_decay}]
        parts = {name: [part for group in groups for part in of_equal_factor(group, factors or {})]
                 for name, groups in self.groups.items()}
        # betas as for contrastive training (arXiv:2303.15343): 0.95 follows a loss whose scale changes faster
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(parts["adamw"], lr=0.0, betas=(0.9, 0.95), fused=True)}
        if matrices:
            dtype = torch.bfloat16 if amp == torch.bfloat16 else None
            self.optimizers["muon"] = Muon(parts["muon"], config.weight_decay, dtype)
        self.scaler = torch.amp.GradScaler(scaler_device) if scaler_device else None

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Moments of each parameter."""
        return {p: state for one in self.optimizers.values() for p, state in one.state.items()}

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def allocate(self) -> None:
        """Create the moments before the first step, so that running out of memory never leaves a step half done."""
        adamw = self.optimizers["adamw"]
        for p in _parameters(adamw):
            if not adamw.state[p]:  # Muon makes its own
                adamw.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def reserve(self) -> None:
        """Take the memory that an update by the gradients that are there needs, and give it back."""
        if isinstance(muon := self.optimizers.get("muon"), Muon):
            muon.reserve()

    def step(self, lr: float, loss_is_finite: Tensor | bool = True) -> tuple[Tensor, Tensor]:
        """Clip and update, or leave everything as it was if loss or gradient is not finite; gradients are freed.

        Returns the gradient's norm before clipping and whether it and the loss were finite, both on the device.
        """
        self.lr, unscaled = lr, self._unscale()
        norm = clip_gradients([p.grad for p in self.parameters if p.grad is not None], self.clip)
        finite = norm.isfinite() & loss_is_finite  # a loss of NaN may have finite gradients
        for optimizer in self.optimizers.values():
            # not scaler.step: it takes a norm that overflows, of gradients that do not, for a good step
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]
            optimizer.step()
            for p in _parameters(optimizer):
                p.grad = None
        if self.scaler is not None and unscaled:
            self.scaler.update()
        self.zero_grad()
        return norm, finite

    def _unscale(self) -> bool:
        """Undo the loss scale of fp16; False if there was none, or no gradient, which the scaler does not take."""
        used = [one for one in self.optimizers.values() if any(p.grad is not None for p in _parameters(one))]
        for optimizer in used:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
        return self.scaler is not None and bool(used)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def fits(self, state: dict[str, dict]) -> bool:
        """Whether a saved state is of the same optimizers with as many parameters."""
        def shape(states: dict[str, dict]) -> dict[str, list[int]]:
            return {name: [len(group["params"]) for group in optimizer["param_groups"]]
                    for name, optimizer in states.items() if name != "scaler"}

        return shape(state) == shape(self.state_dict())

    def state_dict(self) -> dict[str, dict]:
        """The state of each optimizer as torch saves one, in the groups that there are without learning-rate factors:
        a run may go on with others."""
        return {**{name: self._saved(name) for name in self.optimizers},
                "scaler": self.scaler.state_dict() if self.scaler else {}}

    def _saved(self, name: str) -> dict[str, Any]:
        numbers: dict[Tensor, int] = {p: number for number, p in enumerate(self._in_order(name))}
        options = {**self.optimizers[name].param_groups[0], "lr": self.lr}
        del options["lr_factor"]
        return {"state": {numbers[p]: moments for p, moments in self.optimizers[name].state.items()},
                "param_groups": [{**options, **group, "params": [numbers[p] for p in group["params"]]}
                                 for group in self.groups[name]]}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on from the moments of `state`; weight decay and learning-rate factors stay as the settings say."""
        for name, optimizer in self.optimizers.items():
            own, order = optimizer.state_dict(), self._in_order(name)
            numbers = {p: number for number, p in enumerate(_parameters(optimizer))}
            own["state"] = {numbers[order[number]]: moments for number, moments in state[name]["state"].items()}
            optimizer.load_state_dict(own)
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _in_order(self, name: str) -> list[nn.Parameter]:
        """The parameters of an optimizer in the order in which they are saved."""
        return [p for group in self.groups[name] for p in group["params"]]


def clip_gradients(gradients: list[Tensor], most: float) -> Tensor:
    """Scale the gradients together so that their norm is at most about `most`; the norm before, on the device.

    The numbers of nn.utils.clip_grad_norm_, which takes whole lists at a time on some devices alone.
    """
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if math.isfinite(most):
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])


class MovingAverage:
    """Exponential moving average of a module's parameters, in float32 on their device (arXiv:1803.05407's relative).

    The decay of the n-th update warms up as (1 + n) / (10 + n), so that short runs do not remember their initial
    weights. A step that the optimizer left undone is none: neither the values nor n change.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        self.values = [p.detach().clone() for p in module.parameters()]
        self.updates = torch.zeros((), dtype=torch.int64, device=self.values[0].device)

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], done: Tensor) -> None:
        """Take in the weights after a step. `done`: bool on the device, whether the step changed them, as
        `Optimizer.step` says; no host synchronisation."""
        self.updates += done
        weight = (9 / (10 + self.updates)).clamp(min=1 - self.decay) * done  # 1 - the decay
        moving = [(value, p) for value, p in zip(self.values, parameters, strict=True) if p.requires_grad]
        values, weights = map(list, zip(*moving, strict=True))
        changes = torch._foreach_sub(weights, values)  # no larger than the gradients, which are free by now
        torch._foreach_mul_(changes, weight.to(values[0].dtype))
        torch._foreach_add_(values, changes)

    def swap(self, module: nn.Module) -> None:
        """Exchange the averaged weights with those of the module; a second call restores them."""
        with torch.no_grad():
            for value, p in zip(self.values, module.parameters(), strict=True):
                kept = p.detach().clone()
                p.copy_(value)
                value.copy_(kept)

    def state_dict(self) -> dict[str, object]:
        return {"updates": int(self.updates), "values": dict(zip(self.names, self.values, strict=True))}

    def load_state_dict(self, state: dict) -> None:
        self.updates.fill_(state["updates"])
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state["values"][name])
