"""A model without its weights: what a batch must know before, or where, none runs."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pplex.batch.plan import digest_of
from pplex.checkpoint import voices
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.conversation.prompts import choose_text, choose_voice
from pplex.conversation.script import Script, lay_out
from pplex.files import open_regular, reading
from pplex.model.config import ModelConfig
from pplex.respond.manifest import file_print
from pplex.respond.request import Request
from pplex.respond.transcript import CueShape

_BLOCK = 1 << 20
# A file of weights up to this size is hashed whole, a larger one in samples.
_WHOLE_BYTES = 256 << 20
_NUM_SAMPLES = 64


@dataclass(frozen=True)
class Description:
    """A model's files, sizes, tokenizer and voices; ``identity`` tells its weights."""

    local: LocalModel
    config: ModelConfig
    tokenizer: TextTokenizer
    voices: dict[str, Path]
    identity: str
    _digests: dict[Path, str] = field(default_factory=dict)

    def with_role(self, request: Request) -> Request:
        """``request`` with a voice and a role, the model's own where it has none."""
        settings = request.settings
        voice = choose_voice(self, settings.voice)
        if voice:
            self.voice_file(voice)
        text = choose_text(self, settings.text)
        self.script_of(request)
        return replace(request, settings=replace(settings, voice=voice, text=text))

    def script_of(self, request: Request) -> Script:
        """What the agent is made to say, and in which frames."""
        return lay_out(request.settings.lines, self.tokenizer, self.config)

    def voice_of(self, request: Request) -> str:
        """The voice of ``request``: a name of this model, or a file; empty for none."""
        return choose_voice(self, request.settings.voice)

    def voice_file(self, voice: str) -> Path:
        """The file of a voice."""
        return voices.voice_file(voice, self.voices)

    def settings_digest(self, request: Request) -> str:
        """A hash of all that decides the outputs of ``request``, but its recording."""
        settings, outputs = request.settings, request.outputs
        transcripts = ",".join(path.suffix for path in outputs.transcripts)
        # Of what came later only what is asked for counts: answers of earlier versions
        # are done.
        more: dict[str, object] = {}
        if outputs.cue != CueShape():
            more["cue"] = asdict(outputs.cue)
        if settings.lines:
            more["script"] = settings.said()
        return digest_of(
            {
                "model": self.identity,
                "voice": [self.voice_of(request), self._voice_digest(request)],
                "prompt": choose_text(self, settings.text),
                "sampling": asdict(settings.sampling),
                "seed": settings.seed,
                "channel": settings.channel,
                "tail_s": settings.tail,
                "layout": outputs.layout,
                "transcript": transcripts or None,
                "stats": outputs.stats is not None,
                "tokens": outputs.tokens is not None,
            }
            | more
        )

    def _voice_digest(self, request: Request) -> str | None:
        if not (voice := self.voice_of(request)):
            return None
        path = self.voice_file(voice)
        if path not in self._digests:
            with reading(f"voice {path}", "cannot be read"):
                self._digests[path] = file_print(path).sha256
        return self._digests[path]


def describe(local: LocalModel) -> Description:
    """Read what can be known of a model without its weights."""
    folder = local.folder
    return Description(
        local=local,
        config=folder.read_config(),
        tokenizer=TextTokenizer.load(folder.tokenizer),
        voices=voices.find_voices(local.path),
        identity=model_identity(local),
    )


def model_identity(local: LocalModel) -> str:
    """What tells a model from another: its commit, or else its files' contents."""
    if local.repo is not None:
        return f"{local.repo}@{local.revision}"
    folder = local.folder
    # Without voices: one counts where it is used.
    own = [*folder.lm_files, folder.codec, folder.tokenizer]
    if folder.config_file.is_file():
        own.append(folder.config_file)
    return f"files:{digest_of({path.name: _sampled(path) for path in own})}"


def _sampled(path: Path) -> list[object]:
    """Size and hash of a file; of a large one, hash of evenly spaced samples."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return [size, file_print(path).sha256]
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for idx in range(_NUM_SAMPLES):
            file.seek(idx * (size - _BLOCK) // (_NUM_SAMPLES - 1))
            digest.update(file.read(_BLOCK))
    return [size, digest.hexdigest()]
