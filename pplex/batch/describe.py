"""A model without its weights: what a batch must know before, or where, none runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pplex.checkpoint import voices
from pplex.checkpoint.hashes import digest_of, model_identity, sampled
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.conversation.prompts import choose_text, choose_voice
from pplex.conversation.script import Script, lay_out
from pplex.files import reading
from pplex.model.config import ModelConfig
from pplex.respond.request import Request
from pplex.respond.transcript import CueShape


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
        if settings.resume is not None:  # it has its own
            return request
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
        voice = request.settings.voice
        return (
            choose_voice(self, voice)
            if request.settings.resume is None
            else voice or ""
        )

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
        if settings.resume is not None:
            more["resume"] = self._digest(settings.resume, "the saved conversation")
        if outputs.state is not None:
            more["state"] = True
        return digest_of(
            {
                "model": self.identity,
                "voice": [self.voice_of(request), self._voice_digest(request)],
                "prompt": settings.text
                if settings.resume
                else choose_text(self, settings.text),
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
        voice = self.voice_of(request)
        if not voice or request.settings.resume is not None:
            return None
        return self._digest(self.voice_file(voice), "voice")

    def _digest(self, path: Path, what: str) -> str:
        """What tells a file's content."""
        if path not in self._digests:
            with reading(f"{what} {path}", "cannot be read"):
                self._digests[path] = str(sampled(path)[-1])
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
