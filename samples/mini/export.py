"""Write the trained model as a checkpoint folder.

    python export.py WORK FOLDER

Needs WORK/codec.pt, WORK/codec_ear.pt, WORK/lm_7.pt (and of other seeds, where there
are such), WORK/agent.pt and WORK/tokenizer.model. The language model is the mean of
these, bfloat16, the codec float16 (a loader widens both), with the encoder of the one
and all else of the other. Also writes the voices: NATF0 (flite slt) and NATM0 (flite
rms).
"""

import argparse
import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from codes import Agent
from nets import HEARS, LanguageModel
from plan import Grid
from safetensors.torch import save_file
from sizes import DELAYS, PAD, config
from torch import Tensor
from train_lm import widen

VOICES = {"NATF0": "slt", "NATM0": "rms"}
VOICE_FRAMES = 37
USER_ACOUSTIC = range(9, 16)
# Training counts padding less than words, so text that is drawn begins too easily; with
# sharper logits of the text, drawn answers are nearly as right as greedy ones.
SHARPER = 3.0


def voice(lm: LanguageModel, grid: Grid, agent: Agent, name: str) -> dict[str, Tensor]:
    """A voice prompt as embeddings and ring of tokens, after VOICE_FRAMES frames."""
    codes = agent.voices[name][0][:, :VOICE_FRAMES]
    n = codes.shape[1]
    sine = agent.constants.sine
    rows = widen(
        grid.rows(torch.full((n,), PAD), codes, sine[0].expand(n)).long()[None]
    )[0]
    rows[10:] = sine[1:, None]
    rows[:, 0] = torch.where(
        torch.arange(17) == 0, grid.text_initial, grid.audio_initial
    )
    rows[10:, 1] = grid.audio_initial
    last = n - 1
    with torch.no_grad():
        embeddings = lm.embed(rows[None, :, :last])[0]
    ring = torch.zeros(1, 17, 4, dtype=torch.int32)
    full = torch.cat([rows, rows[:, -1:]], 1)
    full[2:9, n] = codes[1:, -1]
    ring[0, 0] = PAD
    for row, delay in enumerate(DELAYS):
        for column in range(max(0, n - 3), n + delay):
            ring[0, row, column % 4] = full[row, column]
    return {
        "embeddings": embeddings[:, None, None].to(torch.bfloat16).contiguous(),
        "cache": ring,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    work, folder = args.work, args.folder
    (folder / "voices").mkdir(parents=True, exist_ok=True)
    tokenizer = sentencepiece.SentencePieceProcessor(str(work / "tokenizer.model"))
    sizes = config(tokenizer.vocab_size())
    agent = Agent.load(work / "agent.pt")
    sizes["silence_codes"] = agent.constants.silence.tolist()
    sizes["sine_codes"] = agent.constants.sine.tolist()
    (folder / "config.json").write_text(json.dumps(sizes, indent=2) + "\n")
    shutil.copy(work / "tokenizer.model", folder / sizes["tokenizer_name"])

    files = sorted(work.glob("lm_[0-9]*.pt"))
    trained = [torch.load(file, map_location="cpu") for file in files]
    state = {k: sum(t[k].float() for t in trained) / len(files) for k in trained[0]}
    for table in USER_ACOUSTIC:
        state[f"emb.{table}.weight"].zero_()
    state["text_linear.weight"] *= SHARPER
    state = {k: v.bfloat16().contiguous() for k, v in state.items()}
    save_file(state, folder / sizes["moshi_name"])
    ear, codec = (
        torch.load(work / name, map_location="cpu")
        for name in ("codec_ear.pt", "codec.pt")
    )
    codec |= {k: v for k, v in ear.items() if k.startswith(HEARS)}
    codec = {k: v.half().contiguous() for k, v in codec.items()}
    save_file(codec, folder / sizes["mimi_name"])

    lm = LanguageModel(sizes["lm"])
    lm.load_state_dict({k: v.float() for k, v in state.items()})
    grid = Grid(agent, tokenizer, sizes["lm"]["text_card"], sizes["lm"]["card"])
    for name, speaker in VOICES.items():
        save_file(
            voice(lm, grid, agent, speaker), folder / "voices" / f"{name}.safetensors"
        )
    files = [p for p in folder.rglob("*") if p.is_file()]
    for path in files:
        path.chmod(0o644)
    total = sum(p.stat().st_size for p in files)
    print(f"{folder}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
