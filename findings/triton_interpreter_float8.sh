#!/bin/sh
# Triton 3.7.1 with torch 2.13.0: the interpreter converts float32 to float8e4nv otherwise than a GPU, and a NaN to 480.
#
# Guess, before running it: under TRITON_INTERPRET=1 a conversion to float8e4nv rounds to the nearest number, ties to even,
# as the instruction of a GPU from sm_89 on and torch's own cast do; so kernels with an fp8 cache can be tested there.
#
# Seen: of 127 numbers half way between two neighbours, ties do not go to the even one; a number that should be rounded up
# to the next power of two can come out at half of it, because the carry from the mantissa into the exponent is lost; and
# the two codes of NaN are read as 480 and -480, beyond the largest number of the format, 448.  Numbers that the format
# holds are converted exactly.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install torch==2.13.0 triton==3.7.1 numpy 2>/dev/null
cat > "$folder/convert.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def to_float8(numbers, codes, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(codes + at, tl.load(numbers + at).to(tl.float8e4nv))


@triton.jit
def to_float32(codes, numbers, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(numbers + at, tl.load(codes + at).to(tl.float32))


print("torch", torch.__version__, "triton", triton.__version__)
codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
held = codes.float()[:128].nan_to_num(0.0)
ties = torch.nn.functional.pad((held[:126] + held[1:127]) / 2, (0, 2))


def differing(numbers):
    """Numbers that the interpreter converts otherwise than torch, with both results."""
    found = torch.empty(128, dtype=torch.float8_e4m3fn)
    to_float8[(1,)](numbers, found, COUNT=128)
    wanted = numbers.to(torch.float8_e4m3fn)
    rows = zip(numbers.tolist(), found.float().tolist(), wanted.float().tolist())
    return [row for row in rows if row[1] != row[2]]


exact, rounded = differing(held), differing(ties)
halved = [row for row in rounded if row[1] * 2 == row[2]]
read = torch.empty(256)
to_float32[(1,)](codes, read, COUNT=256)
print(f"  numbers of the format that change: {len(exact)}")
print(f"  ties rounded otherwise than by torch: {len(rounded)} of 126, to half of what they should be: {len(halved)}")
for number, found, wanted in rounded[:4] + halved[:2]:
    print(f"    {number} becomes {found}, in torch {wanted}")
print(f"  the codes of NaN are read as {read[127]} and {read[255]}")
as_seen = not exact and len(rounded) > 20 and halved and read[127] == 480.0 and read[255] == -480.0
raise SystemExit(not as_seen)
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/convert.py"
