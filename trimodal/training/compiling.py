"""torch.compile for the blocks of the model: fewer launches for a GPU, the same mathematics.

A block is compiled by itself, for any number of samples and tokens, and all blocks share what is compiled: one graph
for each kind of call (with or without a mask or drop-path, trained or frozen), a handful in a run. What a block keeps
for its backward pass stays bounded by what it keeps uncompiled, so plans hold, and recompute stands around it as ever.

Which kinds there are is found by a trial of each task before a stage begins (`stage.compile_blocks`), and each is
compiled on an example of one fixed size: so a resumed run compiles what the run before it did, and gives the same bits.
Where that fails, one line says so, and such calls run uncompiled to the end. Evaluation is never compiled.
"""

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from model import TriModalModel
from trimodal.blocks import Block
from trimodal.errors import UserError
from trimodal.memory import devices

EXAMPLE_SIZES = (31, 97)  # samples and tokens of the example that kernels are made by: near those of align's images,
                          # and like no width of a model, since sizes that are equal there would have to be so always
GRAPHS = 64  # torch's own limit is 8, which stages of several recipes would reach
COMPILERS = {"cpu": ("CXX", "g++"), "cuda": ("CC", "gcc")}  # by device: the variable that names one, and the usual one

Say = Callable[[str], None]


class Kind(NamedTuple):
    """What a compiled block depends on, but for the numbers of samples and tokens, if these are above 1."""

    device: torch.device
    autocast: torch.dtype | None
    has_gradients: bool
    given: tuple[Any, ...]  # of each argument
    trained: tuple[bool, ...]  # of each parameter


def wants_compiling(setting: str, device: torch.device) -> bool:
    """Whether `training.compile` asks for compiled blocks. "auto" does not: on CPUs they do not pay
    (benchmarks/README.md), on GPUs that has not been measured.

    Raises:
        UserError: "on" where nothing compiles for this device; names what to install.
    """
    if setting != "on":
        return False
    if device.type not in COMPILERS:
        raise UserError(f"training.compile: on compiles for {' and '.join(COMPILERS)}, not for {device}; set it to off")
    variable, usual = COMPILERS[device.type]
    compiler = os.environ.get(variable) or usual
    if shutil.which(compiler) is None:
        raise UserError(f"training.compile: on needs the compiler {compiler!r}, which this machine lacks; install it "
                        f"(apt-get install {usual}), name another one in {variable}, or set training.compile to off")
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("training.compile: on needs the package triton, and a GPU that it knows; install it (pip "
                            "install triton), or set training.compile to off")
    return True


class CompiledBlocks:
    """Runs the blocks of a model compiled while it trains. Names, weights and hooks stay as they are."""

    def __init__(self, model: TriModalModel, say: Say):
        self.say = say
        # deterministic: no kernel is chosen by a clock, so that each run compiles the same
        self.compiled: Callable[..., Tensor] = torch.compile(
            Block.forward, dynamic=True, fullgraph=True, options={"deterministic": True})
        self.works: dict[Kind, bool] = {}
        self.found: dict[Kind, tuple[Block, list[Any]]] | None = None  # within `trial`: with an example of each
        self.said: set[str] = set()
        for block in (module for module in model.modules() if isinstance(module, Block)):
            block.forward = functools.partial(self, block)  # type: ignore[method-assign]

    def __call__(self, block: Block, *given: Any) -> Tensor:
        is_watched = any(child._forward_hooks for child in block.children())  # `diagnostics.watch` looks inside
        if not block.training or is_watched:
            return Block.forward(block, *given)
        kind = kind_of(block, given)
        if self.works.get(kind):
            return self._run(block, given)
        if self.found is not None:
            self.found.setdefault(kind, (block, example_of(given)))
        elif kind not in self.works:
            self._say_once("unforeseen", f"training.compile: blocks called with {sizes_of(given)} were not foreseen, "
                                         "so they run uncompiled")
        return Block.forward(block, *given)

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Within, new kinds of calls are found; they are compiled at the end."""
        self.found = {}
        try:
            yield
            for kind, (block, example) in self.found.items():
                if kind not in self.works:
                    self.works[kind] = self._compile(kind, block, example)
        finally:
            self.found = None

    def _compile(self, kind: Kind, block: Block, example: list[Any]) -> bool:
        """Compile a kind of call, forward and backward; False, and a line, if that fails."""
        began_s = time.perf_counter()
        autocast = torch.autocast(kind.device.type, kind.autocast) if kind.autocast else contextlib.nullcontext()
        wanted = [one for one in (*example, *block.parameters()) if isinstance(one, Tensor) and one.requires_grad]
        try:
            with autocast, torch.set_grad_enabled(kind.has_gradients), torch._dynamo.config.patch(
                    recompile_limit=GRAPHS):
                out = recompute(self.compiled, block, *example, use_reentrant=False, preserve_rng_state=False)
            if out.requires_grad:
                torch.autograd.grad(out.sum(), wanted, allow_unused=True)
        except Exception as error:
            if devices.is_out_of_memory(error):
                raise
            why = " ".join(str(error).split())[:300] or type(error).__name__
            self.say(f"training.compile: blocks called with {sizes_of(example)} cannot be compiled, so they run "
                     f"uncompiled: {why}")
            return False
        self.say(f"training.compile: blocks called with {sizes_of(example)} compiled in "
                 f"{time.perf_counter() - began_s:.0f} s")
        return True

    def _run(self, block: Block, given: tuple[Any, ...]) -> Tensor:
        values = [value.contiguous() if isinstance(value, Tensor) else value for value in given]
        try:
            with torch.compiler.set_stance("fail_on_recompile"):  # else graphs would grow, each in half a minute
                return self.compiled(block, *values)
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            why = " ".join(str(error).split())[-200:]
        self._say_once("other", f"training.compile: blocks called with {sizes_of(given)} would need another graph, so "
                                f"they run uncompiled: {why}")
        return Block.forward(block, *given)

    def _say_once(self, what: str, line: str) -> None:
        if what not in self.said:
            self.said.add(what)
            self.say(line)


def kind_of(block: Block, given: tuple[Any, ...]) -> Kind:
    device = given[0].device
    facts = tuple((one.dtype, one.requires_grad, *(min(size, 2) for size in one.shape[:2]), *one.shape[2:])
                  if isinstance(one, Tensor) else one for one in given)
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return Kind(device, autocast, torch.is_grad_enabled(), facts, tuple(p.requires_grad for p in block.parameters()))


def example_of(given: tuple[Any, ...]) -> list[Any]:
    """Arguments of the same kind, all of EXAMPLE_SIZES; a size of 1 stays."""
    def example(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        sizes = [size if size == 1 else usual for size, usual in zip(one.shape, EXAMPLE_SIZES, strict=False)]
        return torch.ones(*sizes, *one.shape[2:], dtype=one.dtype, device=one.device, requires_grad=one.requires_grad)

    return [example(one) for one in given]


def sizes_of(given: Any) -> str:
    """Sizes of the arguments of a block, for a message."""
    return ", ".join("x".join(map(str, one.shape)) if isinstance(one, Tensor) else str(one) for one in given)
