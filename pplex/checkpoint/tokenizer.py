"""Text pieces: role prompts to ids, ids to what the reference prints."""

import functools
from pathlib import Path

import sentencepiece

from pplex.errors import PplexError
from pplex.files import read_regular, reading
from pplex.model.config import TEXT_EPAD, TEXT_PAD

MAX_BYTES = 1 << 27

_TAG = "<system>"
_WORD_MARK = "\u2581"


class TextTokenizer:
    """SentencePiece model of the text stream."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read a `tokenizer_spm_*.model` file."""
        broken = "is not a SentencePiece model; download the checkpoint again"
        with reading(f"the text tokenizer {path}", broken):
            try:
                content = read_regular(path, MAX_BYTES)
            except FileNotFoundError as e:
                raise PplexError(
                    f"the text tokenizer {path} does not exist; "
                    "the checkpoint is incomplete: download it again"
                ) from e
            processor = sentencepiece.SentencePieceProcessor()
            loaded = bool(content) and processor.LoadFromSerializedProto(content)
            if not loaded or not processor.get_piece_size():
                raise ValueError("it has no pieces")
            for idx in range(processor.get_piece_size()):
                processor.id_to_piece(idx)  # is text, or raises
        return cls(processor)

    @functools.cached_property
    def num_pieces(self) -> int:
        """How many ids there are."""
        return int(self._processor.get_piece_size())

    def encode_prompt(self, text: str) -> list[int]:
        """Turn a role prompt into ids, tagged; no ids for an empty text.

        Blanks are no empty text: between their tags is nothing.
        """
        return self.encode(wrap_prompt(text)) if text else []

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, as it is."""
        return list(self._processor.encode(text))

    def piece(self, idx: int) -> str:
        """Print an id as the reference does: EPAD, PAD, or its piece with spaces."""
        if idx == TEXT_EPAD:
            return "EPAD"
        if idx == TEXT_PAD:
            return "PAD"
        if not 0 <= idx < self.num_pieces:
            raise ValueError(f"text id {idx} is not in 0..{self.num_pieces - 1}")
        return str(self._processor.id_to_piece(int(idx))).replace(_WORD_MARK, " ")


def wrap_prompt(text: str) -> str:
    """Strip a role prompt and put it between `<system>` tags unless it has both."""
    text = text.strip()
    if text.startswith(_TAG) and text.endswith(_TAG):
        return text
    return f"{_TAG} {text} {_TAG}"
