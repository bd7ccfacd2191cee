#!/usr/bin/env bash
# torch's fused optimizers on a CPU pair weight and gradient by their order in memory, not by their index.
#
# Versions:  torch 2.14.1.
# Expected:  fused=True gives the numbers of fused=False, whatever the memory layout of the gradient; or an error, as the
#            fused kernels of a GPU raise where layouts differ.
# Behaviour: where a gradient has other strides than its weight, as a transposed tensor that is assigned to `.grad`, each
#            weight is moved by the gradient of another one. No warning, no exception. SGD, Adam, AdamW and Adagrad alike.
# Why it matters: backward() gives gradients the layout of their weights, but code that assigns them does not: gradient
#            caching for large contrastive batches, sums over processes, unpacked or accumulated gradients. Such a run
#            learns something, worse, and only on the CPU, where it is tested.
# Output:
OUTPUT='SGD      gradient as the weight lies: same; transposed in memory: other weights
Adam     gradient as the weight lies: same; transposed in memory: other weights
AdamW    gradient as the weight lies: same; transposed in memory: other weights
Adagrad  gradient as the weight lies: same; transposed in memory: other weights'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/fused.py" <<'EOP'
import warnings

import torch

warnings.simplefilter("error")
gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
layouts = {"as the weight lies": gradient, "transposed in memory": gradient.T.contiguous().T}


def step(name, layout, fused):
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    weight.grad = layouts[layout].clone(memory_format=torch.preserve_format)
    assert torch.equal(weight.grad, gradient)
    getattr(torch.optim, name)([weight], lr=0.1, fused=fused).step()
    return weight.detach()


for name in ("SGD", "Adam", "AdamW", "Adagrad"):
    said = [f"{layout}: " + ("same" if torch.allclose(step(name, layout, False), step(name, layout, True), atol=1e-6)
                             else "other weights") for layout in layouts]
    print(f"{name:8} gradient {'; '.join(said)}")
EOP
found=$("$folder/venv/bin/python" "$folder/fused.py")
echo "$found"
[ "$found" = "$OUTPUT" ] || { echo "torch behaves otherwise now" >&2; exit 1; }
