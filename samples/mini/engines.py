"""More synthesisers for the user's side, where their files are at hand.

Each is a function from text, pitch and tempo factors to a sample rate, 16-bit PCM and
the end (s) of every phone, where it tells. Where they are is told by environment
variables:

* festival: its program, with voices of Debian's festvox packages
* `PICO`: a folder with `libsvoxpico.so` and `lang/` (SVOX Pico, Apache 2.0)
* `RHVOICE`: a folder with `libRHVoice.so`, `data` and `config` (RHVoice, LGPL 2.1; its
  voices bdl and clb are of CMU ARCTIC)
* `KOKORO`: see kokoro.py
"""

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from kokoro import kokoro

PICO_RATE = 16000


class _Pico:
    """One of Pico's voices, loaded."""

    def __init__(self, voice: str) -> None:
        folder = Path(os.environ["PICO"])
        self.lib = ctypes.CDLL(str(folder / "libsvoxpico.so"))
        self.memory = ctypes.create_string_buffer(10_000_000)
        self.system, self.engine = ctypes.c_void_p(), ctypes.c_void_p()
        byref = ctypes.byref
        self.check(
            self.lib.pico_initialize(self.memory, len(self.memory), byref(self.system))
        )
        self.check(self.lib.pico_createVoiceDefinition(self.system, b"voice"))
        for file in sorted((folder / "lang").glob(f"{voice}_*.bin")):
            resource, name = ctypes.c_void_p(), ctypes.create_string_buffer(200)
            self.check(
                self.lib.pico_loadResource(
                    self.system, str(file).encode(), byref(resource)
                )
            )
            self.check(self.lib.pico_getResourceName(self.system, resource, name))
            self.check(
                self.lib.pico_addResourceToVoiceDefinition(self.system, b"voice", name)
            )
        self.check(self.lib.pico_newEngine(self.system, b"voice", byref(self.engine)))

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"Pico says {status}")

    def speak(self, text: str) -> np.ndarray:
        data = text.encode() + b"\0"
        parts, done = [], 0
        block = ctypes.create_string_buffer(4096)
        received, kind, taken = (ctypes.c_int16() for _ in range(3))
        busy = 201
        while True:
            if done < len(data):
                self.check(
                    self.lib.pico_putTextUtf8(
                        self.engine, data[done:], len(data) - done, ctypes.byref(taken)
                    )
                )
                done += taken.value
            status = self.lib.pico_getData(
                self.engine,
                block,
                len(block),
                ctypes.byref(received),
                ctypes.byref(kind),
            )
            parts.append(block.raw[: received.value])
            if status != busy and done >= len(data):
                return np.frombuffer(b"".join(parts), np.int16)


@cache
def _pico(voice: str) -> _Pico:
    return _Pico(voice)


Sound = tuple[int, np.ndarray, list[tuple[float, str]]]


def pico(voice: str, text: str, pitch: float, tempo: float) -> Sound:
    """Say it with Pico."""
    tagged = (
        f'<pitch level="{round(100 * pitch)}"><speed level="{round(100 * tempo)}">'
        f"{text}</speed></pitch>"
    )
    return PICO_RATE, _pico(voice).speak(tagged), []


_SetRate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_Play = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_uint, ctypes.c_void_p
)


class _RhSetUp(ctypes.Structure):
    _fields_ = [
        ("data_path", ctypes.c_char_p),
        ("config_path", ctypes.c_char_p),
        ("resource_paths", ctypes.c_void_p),
        ("set_sample_rate", _SetRate),
        ("play_speech", _Play),
        ("optional", ctypes.c_void_p * 7),
        ("options", ctypes.c_uint),
    ]


class _RhSpeech(ctypes.Structure):
    _fields_ = [
        ("voice_profile", ctypes.c_char_p),
        ("absolute", ctypes.c_double * 3),
        ("rate", ctypes.c_double),
        ("pitch", ctypes.c_double),
        ("volume", ctypes.c_double),
        ("punctuation_mode", ctypes.c_int),
        ("punctuation_list", ctypes.c_char_p),
        ("capitals_mode", ctypes.c_int),
        ("flags", ctypes.c_int),
    ]


class _RhVoice:
    """RHVoice, set up once."""

    def __init__(self) -> None:
        folder = Path(os.environ["RHVOICE"])
        ctypes.CDLL(str(folder / "libRHVoice_core.so.4"), mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(folder / "libRHVoice.so"))
        pointer = ctypes.c_void_p
        self.lib.RHVoice_new_tts_engine.restype = pointer
        self.lib.RHVoice_new_message.restype = pointer
        self.lib.RHVoice_new_message.argtypes = [
            *(pointer, ctypes.c_char_p, ctypes.c_uint, ctypes.c_int),
            *(ctypes.POINTER(_RhSpeech), pointer),
        ]
        self.lib.RHVoice_speak.argtypes = [pointer]
        self.lib.RHVoice_delete_message.argtypes = [pointer]
        self.rate, self.parts = 0, []
        self.set_up = _RhSetUp(
            str(folder / "data").encode(),
            str(folder / "config").encode(),
            None,
            _SetRate(self._set_rate),
            _Play(self._play),
        )
        self.engine = self.lib.RHVoice_new_tts_engine(ctypes.byref(self.set_up))
        if not self.engine:
            raise RuntimeError(f"RHVoice does not start in {folder}")

    def _set_rate(self, rate: int, _) -> int:
        self.rate = rate
        return 1

    def _play(self, samples, count: int, _) -> int:
        self.parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 1

    def speak(self, voice: str, text: str, pitch: float, tempo: float) -> np.ndarray:
        self.parts.clear()
        speech = _RhSpeech(voice.encode(), (0, 0, 0), tempo, pitch, 1.0)
        data = text.encode()
        message = self.lib.RHVoice_new_message(
            self.engine, data, len(data), 0, ctypes.byref(speech), None
        )
        self.lib.RHVoice_speak(message)
        self.lib.RHVoice_delete_message(message)
        return np.concatenate(self.parts)


_rhvoice = cache(_RhVoice)


def rhvoice(voice: str, text: str, pitch: float, tempo: float) -> Sound:
    """Say it with RHVoice."""
    pcm = _rhvoice().speak(voice, text, pitch, tempo)
    return _rhvoice().rate, pcm, []


def festival(voice: str, text: str, pitch: float, tempo: float) -> Sound:
    """Say it with festival, at its own pitch."""
    assert pitch == 1
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        orders = (
            f"(begin (voice_{voice}) (Parameter.set 'Duration_Stretch {1 / tempo}) "
            f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{file.name}"))'
        )
        subprocess.run(["festival", "--batch", orders], check=True)
        pcm, rate = soundfile.read(file.name, dtype="int16")
    return rate, pcm, []


ENGINES = {"festival": festival, "kokoro": kokoro, "pico": pico, "rhvoice": rhvoice}
