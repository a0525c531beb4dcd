"""Take a checkpoint apart again, to go on training from it.

    python restore.py FOLDER WORK

Writes WORK/codec_listen.pt, WORK/codec_ear.pt, WORK/codec.pt, WORK/lm_begin.pt and
WORK/tokenizer.model, from which agent.py, users.py and train_lm.py go on.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from export import SHARPER
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    sizes = json.loads((args.folder / "config.json").read_text())
    codec = load_file(args.folder / sizes["mimi_name"])
    for name in ("codec_listen.pt", "codec_ear.pt", "codec.pt"):
        torch.save(codec, args.work / name)
    lm = load_file(args.folder / sizes["moshi_name"])
    lm["text_linear.weight"] /= SHARPER
    torch.save(lm, args.work / "lm_begin.pt")
    shutil.copy(args.folder / sizes["tokenizer_name"], args.work / "tokenizer.model")


if __name__ == "__main__":
    main()
