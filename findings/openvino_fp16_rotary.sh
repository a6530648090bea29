#!/bin/sh
# openvino 2026.4.1: a model saved in 16 bits, as by default, has its rotary frequencies in 16 bits too: far into a text
# its rotary angles are wrong by radians.
#
# Guess, before looking at exports of optimum-intel: save_model(compress_to_fp16=True) stores weights in 16 bits, but the
# few frequencies that positions are multiplied by stay in 32 bits, because rounding them is not a small error.
#
# Seen: they are stored in 16 bits like any other constant (`optimum-cli export openvino --weight-format fp16` saves so;
# its int8 and int4 exports keep them in 32 bits).  With the frequencies of Persimmon-8B, theta 25000 over 32 dimensions,
# the angle at position p is wrong by up to p * 2e-4 (the second frequency), 3.4 radians at the last of 16,384 positions.
# Cosines are off by 0.006 at position 100, by 0.045 at 1,000 and by 0.86 at 16,383.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install openvino==2026.4.1 numpy 2>/dev/null
FOLDER="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import os

import numpy as np
import openvino as ov
from openvino import opset13 as ops

theta, dimensions = 25000.0, 32
frequencies = (theta ** -(np.arange(0, dimensions, 2) / dimensions)).astype(np.float32)

# What Transformers' rotary embedding is in an export: frequencies [1, 16, 1] times positions [batch, 1, length].
positions = ops.parameter([-1, -1], ov.Type.i64, name="position_ids")
row = ops.convert(ops.unsqueeze(positions, ops.constant(1)), "f32")
angles = ops.matmul(ops.constant(frequencies.reshape(1, -1, 1)), row, False, False)
model = ov.Model([ops.result(ops.cos(angles))], [positions])

core = ov.Core()
asked = np.array([[100, 1000, 16383]])
expected = np.cos(frequencies.astype(np.float64)[:, None] * asked)
print("openvino", ov.__version__)
errors = {}
for compressed in (False, True):
    path = os.path.join(os.environ["FOLDER"], f"{compressed}.xml")
    ov.save_model(model, path, compress_to_fp16=compressed)
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    errors[compressed] = np.abs(compiled([asked])[0][0] - expected).max(axis=0)
    shown = ", ".join(f"{error:.1e} at {position}" for error, position in zip(errors[compressed], asked[0]))
    print(f"  compress_to_fp16={compressed}: largest error of a cosine {shown}")
raise SystemExit(not (errors[False].max() < 2e-3 and errors[True][0] > 3e-3 and errors[True][2] > 0.5))
PYTHON
