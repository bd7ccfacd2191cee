#!/usr/bin/env bash
# timm takes a file that lacks a whole block without a word, as soon as the classifier is left out.
#
# Versions:  timm 1.0.31, torch 2.14.1.
# Expected:  pretrained=True with a file of one's own (pretrained_cfg_overlay) is strict, as it is for the whole model: a
#            missing block is an error, or at least a warning, whatever becomes of the classifier.
# Behaviour: with num_classes=10 the file is refused. With num_classes=0, the way to open an encoder, the same file is
#            taken and the block keeps its random weights. No warning, no exception; what is missing is told to the log at
#            level INFO, which nothing shows by default.
# Why it matters: encoders for retrieval are opened without their classifier. A file that was cut short, or converted with
#            a block lost, gives features that look alive and are partly random.
# Output:
OUTPUT='10 classes: refused (missing keys)
 0 classes: opened, warnings 0; block 4 of the file: True; block 5 of the file: False'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet timm==1.0.31 torch==2.14.1 torchvision==0.29.1
cat > "$folder/incomplete.py" <<'EOP'
import sys
import warnings

import timm
import torch
from safetensors.torch import save_file

NAME, FILE = "vit_tiny_patch16_224", sys.argv[1] + "/weights.safetensors"
whole = timm.create_model(NAME, num_classes=10)
save_file({key: value for key, value in whole.state_dict().items() if not key.startswith("blocks.5.")}, FILE)
for classes in (10, 0):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            model = timm.create_model(NAME, pretrained=True, num_classes=classes,
                                      pretrained_cfg_overlay={"file": FILE, "num_classes": 10})
        except RuntimeError as error:
            print(f"{classes:2} classes: refused ({'missing keys' if 'Missing key' in str(error) else error})")
            continue
    same = [torch.equal(model.blocks[i].mlp.fc1.weight, whole.blocks[i].mlp.fc1.weight) for i in (4, 5)]
    print(f"{classes:2} classes: opened, warnings {len(told)}; block 4 of the file: {same[0]}; "
          f"block 5 of the file: {same[1]}")
EOP
found=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/incomplete.py" "$folder")
echo "$found"
[ "$found" = "$OUTPUT" ] || { echo "timm behaves otherwise now" >&2; exit 1; }
