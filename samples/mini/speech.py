"""Speech from free synthesisers, from two of them with the times of words and phones.

flite (BSD-like licence) gives both agent voices and some user voices, espeak-ng (GPL,
used as a tool only) and those of `engines.py` the other user voices. All are called
through their C libraries.
"""

import ctypes
import os
from dataclasses import dataclass, field
from functools import cache
from math import gcd

import numpy as np
from engines import ENGINES
from scipy.signal import resample_poly

SAMPLE_RATE = 24000

PHONES = (
    "pau aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r "
    "s sh t th uh uw v w y z zh"
).split()

# espeak-ng's mnemonics for American English, as flite's phones; two for diphthongs and
# r-coloured vowels.
_ESPEAK = {
    "a": "ae", "aa": "aa", "a#": "ax", "A:": "aa", "A": "aa", "A~": "aa", "A@": "aa r",
    "0": "aa", "O:": "ao", "O": "ao", "O2": "ao", "O@": "ao r", "o@": "ao r",
    "V": "ah", "@": "ax", "@2": "ax", "@5": "ax", "@L": "ax l", "3": "er", "3:": "er",
    "I": "ih", "I#": "ih", "I2": "ih", "i": "iy", "i:": "iy", "i@": "iy ax",
    "i@3": "ih r", "E": "eh", "E#": "eh", "e@": "eh r", "U": "uh", "u:": "uw",
    "u": "uw", "U@": "uh r", "aI": "ay", "aI@": "ay ax", "aI3": "ay er", "aU": "aw",
    "aU@": "aw ax", "OI": "oy", "oU": "ow", "eI": "ey", "e": "eh", "tS": "ch",
    "dZ": "jh", "j": "y", "h": "hh", "N": "ng", "S": "sh", "Z": "zh", "T": "th",
    "D": "dh", "t#": "t", "t2": "t", "*": "d", "r-": "r", "r": "r", "n-": "n",
    "l#": "l",
}  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """One spoken sentence.

    `pcm` is float32 at 24 kHz, `words` holds (start, word) and `phones` (end, index
    into PHONES), in seconds.
    """

    pcm: np.ndarray
    words: list[tuple[float, str]] = field(default_factory=list)
    phones: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Voice:
    """A way to speak: a synthesiser's voice, its speed, its pitch.

    `warp` resamples the finished speech: above 1 a smaller person. `pitch` is in Hz for
    flite, 0 to 99 for espeak, a factor for others; None keeps the voice's own. Names
    with a colon are voices of `engines.py`.
    """

    name: str
    stretch: float = 1.0
    pitch: float | None = None
    warp: float = 1.0


def speak(text: str, voice: Voice) -> Clip:
    """Say a sentence."""
    if ":" in voice.name:
        engine, name = voice.name.split(":")
        rate, pcm, phones = ENGINES[engine](
            name, text, voice.pitch or 1.0, 1 / voice.stretch
        )
        words, phones = [], [(end, PHONES.index(phone)) for end, phone in phones]
    elif voice.name.startswith("en"):
        rate, pcm, words, phones = _espeak(text, voice)
    else:
        rate, pcm, words, phones = _flite(text, voice)
    pcm = pcm.astype(np.float32) / 32768
    up, down = SAMPLE_RATE, round(rate * voice.warp / 50) * 50
    common = gcd(up, down)
    pcm = resample_poly(pcm, up // common, down // common).astype(np.float32)
    scale = rate / down
    return Clip(
        pcm,
        [(start * scale, word) for start, word in words],
        [(end * scale, phone) for end, phone in phones],
    )


@cache
def _library(name: str) -> ctypes.CDLL:
    folder = os.environ.get("FLITE_LIBRARIES", "")
    return ctypes.CDLL(os.path.join(folder, name), mode=ctypes.RTLD_GLOBAL)


class _Wave(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


@cache
def _flite_library() -> ctypes.CDLL:
    for name in ("flite", "flite_usenglish", "flite_cmulex"):
        lib = _library(f"lib{name}.so.1")
    lib = _library("libflite.so.1")
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    signatures = {
        "flite_synth_text": (pointer, [text, pointer]),
        "utt_wave": (ctypes.POINTER(_Wave), [pointer]),
        "utt_relation": (pointer, [pointer, text]),
        "relation_head": (pointer, [pointer]),
        "item_next": (pointer, [pointer]),
        "item_feat_string": (text, [pointer, text]),
        "item_feat_float": (ctypes.c_float, [pointer, text]),
        "ffeature_float": (ctypes.c_float, [pointer, text]),
        "delete_utterance": (None, [pointer]),
        "feat_set_float": (None, [pointer, text, ctypes.c_float]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.flite_init()
    return lib


class _FliteVoice(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


@cache
def _flite_voice(name: str) -> ctypes.POINTER(_FliteVoice):
    _flite_library()
    part = "kal16" if name == "kal16" else name
    register = getattr(
        _library(f"libflite_cmu_us_{part}.so.1"), f"register_cmu_us_{part}"
    )
    register.restype = ctypes.POINTER(_FliteVoice)
    register.argtypes = [ctypes.c_char_p]
    return register(None)


_FLITE_PITCH = {"slt": 165.0, "rms": 95.0, "awb": 120.0, "kal16": 105.0}


def _flite(text: str, voice: Voice) -> tuple:
    lib, handle = _flite_library(), _flite_voice(voice.name)
    features = handle.contents.features
    lib.feat_set_float(features, b"duration_stretch", voice.stretch)
    if voice.pitch is not None:
        lib.feat_set_float(features, b"int_f0_target_mean", voice.pitch)
    utterance = lib.flite_synth_text(
        text.encode(), ctypes.cast(handle, ctypes.c_void_p)
    )
    wave = lib.utt_wave(utterance).contents
    pcm = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).copy()
    rate = wave.sample_rate
    words, phones = [], []
    item = lib.relation_head(lib.utt_relation(utterance, b"Segment"))
    while item:
        name = lib.item_feat_string(item, b"name").decode()
        phones.append((lib.item_feat_float(item, b"end"), PHONES.index(name)))
        item = lib.item_next(item)
    item = lib.relation_head(lib.utt_relation(utterance, b"Word"))
    first = b"R:SylStructure.daughter1.daughter1.R:Segment.p.end"
    while item:
        start = lib.ffeature_float(item, first)
        words.append((start, lib.item_feat_string(item, b"name").decode()))
        item = lib.item_next(item)
    lib.delete_utterance(utterance)
    return rate, pcm, words, phones


class _Id(ctypes.Union):
    _fields_ = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_short),
    ctypes.c_int,
    ctypes.POINTER(_Event),
)


class _Espeak:
    """espeak-ng, set up once; collects samples and phone events of one sentence."""

    def __init__(self) -> None:
        import espeakng_loader

        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        path = os.path.dirname(espeakng_loader.get_data_path())
        phoneme_events = 1
        self.rate = self.lib.espeak_Initialize(2, 0, path.encode(), phoneme_events)
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with the data in {path}")
        self.pcm: list[np.ndarray] = []
        self.events: list[tuple[float, str]] = []
        self.callback = _CALLBACK(self._collect)
        self.lib.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count, events) -> int:
        if samples and count > 0:
            self.pcm.append(np.ctypeslib.as_array(samples, (count,)).copy())
        phoneme_type = 7
        i = 0
        while events[i].type != 0:
            if events[i].type == phoneme_type:
                name = (
                    bytes(events[i].id.string).split(b"\0")[0].decode(errors="ignore")
                )
                self.events.append((events[i].audio_position / 1000, name))
            i += 1
        return 0


@cache
def espeak_library() -> _Espeak:
    return _Espeak()


def _espeak(text: str, voice: Voice) -> tuple:
    espeak = espeak_library()
    lib = espeak.lib
    lib.espeak_SetVoiceByName(voice.name.encode())
    rate_parameter, pitch_parameter = 1, 3
    lib.espeak_SetParameter(rate_parameter, int(165 / voice.stretch), 0)
    pitch = 50 if voice.pitch is None else int(voice.pitch)
    lib.espeak_SetParameter(pitch_parameter, pitch, 0)
    espeak.pcm.clear()
    espeak.events.clear()
    data = text.encode() + b"\0"
    utf8 = 1
    lib.espeak_Synth(data, len(data), 0, 1, 0, utf8, None, None)
    lib.espeak_Synchronize()
    pcm = np.concatenate(espeak.pcm) if espeak.pcm else np.zeros(1, np.int16)
    duration = len(pcm) / espeak.rate
    phones = []
    starts = [time for time, _ in espeak.events[1:]] + [duration]
    for (start, name), end in zip(espeak.events, starts, strict=True):
        parts = _phones_of(name)
        for i, part in enumerate(parts):
            time = start + (end - start) * (i + 1) / len(parts)
            phones.append((time, PHONES.index(part)))
    return espeak.rate, pcm, [], phones


def _phones_of(name: str) -> list[str]:
    name = name.lstrip("',")
    if name == ";":
        return []
    if name in _ESPEAK:
        return _ESPEAK[name].split()
    return [name] if name in PHONES else ["pau"]
