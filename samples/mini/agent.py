"""Encode the agent's side once the codec can listen.

    python agent.py WORK

Needs WORK/bank.pt and WORK/codec_listen.pt; writes WORK/tokenizer.model and
WORK/agent.pt (constants, codes of the agent's clips and of the voice prompts).
"""

import argparse
from pathlib import Path

import domain
import torch
from codes import load_bank, make_agent, splice
from nets import Codec
from prompts import train_tokenizer
from sizes import config
from training import device


def load_codec(path: Path) -> Codec:
    """The codec from a training file."""
    codec = Codec(config(1)["mimi"]).to(device()).eval()
    codec.load_state_dict(torch.load(path, map_location=device()))
    return codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    if not (work / "tokenizer.model").exists():
        train_tokenizer(work / "tokenizer.model")
    agent = make_agent(load_codec(work / "codec_listen.pt"), load_bank(work, "bank.pt"))
    splice(agent, domain.families())
    agent.save(work / "agent.pt")


if __name__ == "__main__":
    main()
