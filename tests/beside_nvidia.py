"""Time the loop of NVIDIA's own PersonaPlex code, to compare with ``pplex bench``.

    git clone https://github.com/NVIDIA/personaplex
    python tests/beside_nvidia.py personaplex/moshi --random 7b --device cuda
    pplex bench --random 7b --bits 4

Random weights of the same sizes; the loop of its ``offline.py``, a frame at a time:
encode, step, decode. Needs torch, einops and safetensors beside NVIDIA's code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import types

SIZES = {
    "7b": {},
    "medium": {
        "dim": 512,
        "num_heads": 8,
        "num_layers": 8,
        "depformer_dim": 256,
        "depformer_num_heads": 8,
        "depformer_num_layers": 6,
        "depformer_dim_feedforward": int(4.125 * 256),
    },
}


def main() -> None:
    """Print milliseconds a frame, as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("moshi", help="the folder `moshi` of NVIDIA's repository")
    parser.add_argument("--random", choices=SIZES, default="7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    args = parser.parse_args()
    sys.path.insert(0, args.moshi)
    sys.modules["sphn"] = types.ModuleType("sphn")  # it reads files, none is read here
    print(json.dumps(measure(args)))


def measure(args: argparse.Namespace) -> dict[str, float | str]:
    """Milliseconds a frame: the whole loop, then its steps without the codec."""
    import numpy as np
    import torch
    from moshi.models import loaders
    from moshi.models.lm import LMGen

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    on_gpu = args.device != "cpu"
    loaders._lm_kwargs.update(SIZES[args.random])
    loaders.load_model = lambda model, filename: None  # the weights stay random
    dtype = torch.bfloat16 if on_gpu else torch.float32
    mimi = loaders.get_mimi("none.safetensors", args.device)
    lm = loaders.get_moshi_lm(None, device=args.device, dtype=dtype)
    for tensor in lm.parameters():
        tensor.data.normal_(std=tensor.shape[-1] ** -0.5)
    generator = LMGen(lm, device=args.device, use_sampling=True)
    mimi.streaming_forever(1)
    generator.streaming_forever(1)
    noise = torch.randn(args.frames + 10, 1, 1, 1920, device=args.device) * 0.1

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    whole, steps = [], []
    with torch.no_grad():
        for frame in noise:
            wait()
            start = time.perf_counter()
            codes = mimi.encode(frame)
            wait()
            before = time.perf_counter()
            tokens = generator.step(codes[:, :8])
            wait()
            steps.append(time.perf_counter() - before)
            if tokens is not None:
                mimi.decode(tokens[:, 1:9]).cpu()
            whole.append(time.perf_counter() - start)
    found = {"device": args.device, "size": args.random, "torch": torch.__version__}
    for name, seconds in (("whole", whole), ("step", steps)):
        ms = 1000 * np.array(seconds[10:])
        found |= {f"{name}_p50": np.median(ms), f"{name}_p95": np.percentile(ms, 95)}
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}


if __name__ == "__main__":
    main()
