"""A model without its weights: what a batch must know before, or where, none runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from pplex.batch.identity import digest_of, model_identity
from pplex.batch.tasks import Task
from pplex.checkpoint import voices
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.config import ModelConfig, load_config
from pplex.conversation.session import TOKENIZER_PATTERN, choose_voice
from pplex.errors import PplexError
from pplex.respond.manifest import file_print


@dataclass(frozen=True)
class Description:
    """A model's files, sizes, tokenizer and voices; ``identity`` tells its weights."""

    local: LocalModel
    config: ModelConfig
    tokenizer: TextTokenizer
    voices: dict[str, Path]
    identity: str
    _digests: dict[Path, str] = field(default_factory=dict)

    def voice_of(self, task: Task) -> str:
        """The voice that ``task`` is answered in: a name of this model, or a file."""
        return choose_voice(self, task.settings.voice)

    def voice_file(self, voice: str) -> Path:
        """The file of a voice."""
        path = self.voices.get(voice, Path(voice))
        if not path.is_file():
            known = ", ".join(self.voices) or "none"
            raise PplexError(
                f"voice {voice!r}: neither a voice of this model ({known}) nor a file"
            )
        return path

    def settings_digest(self, task: Task) -> str:
        """A hash of all that decides the outputs of ``task``, but its recording."""
        settings, outputs = task.settings, task.outputs
        transcript = outputs.transcript
        return digest_of(
            {
                "model": self.identity,
                "voice": [self.voice_of(task), self._voice_digest(task)],
                "prompt": settings.text,
                "sampling": asdict(settings.sampling),
                "seed": settings.seed,
                "channel": settings.channel,
                "tail_s": settings.tail_s,
                "layout": outputs.layout,
                "transcript": transcript.suffix if transcript else None,
                "stats": outputs.stats is not None,
                "tokens": outputs.tokens is not None,
            }
        )

    def _voice_digest(self, task: Task) -> str:
        path = self.voice_file(self.voice_of(task))
        if path not in self._digests:
            try:
                self._digests[path] = file_print(path).sha256
            except OSError as e:
                raise PplexError(f"voice {path}: {e.strerror or e}") from e
        return self._digests[path]


def describe(local: LocalModel) -> Description:
    """Read what can be known of a model without its weights."""
    folder = local.path if local.path.is_dir() else local.path.parent
    tokenizers = sorted(folder.glob(TOKENIZER_PATTERN))
    if not tokenizers:
        raise PplexError(f"{folder}: {TOKENIZER_PATTERN} is missing")
    return Description(
        local=local,
        config=load_config(folder / "config.json"),
        tokenizer=TextTokenizer.load(tokenizers[0]),
        voices=voices.find_voices(folder),
        identity=model_identity(local),
    )
