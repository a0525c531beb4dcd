"""Text pieces are the reference's."""

import json
import shutil
from pathlib import Path

import pytest

from pplex.checkpoint.tokenizer import TextTokenizer, wrap_prompt
from pplex.errors import PplexError

DATA = Path(__file__).parent / "data"
MODEL = DATA / "tiny" / "tokenizer_spm_32k_3.model"
REFERENCE = json.loads((DATA / "respond" / "tokenizer_cases.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.load(MODEL)


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda c: c["text"][:20])
def test_prompts_become_the_references_ids(tokenizer, case):
    assert tokenizer.encode_prompt(case["text"]) == case["ids"]


def test_every_id_prints_as_the_reference_prints_it(tokenizer):
    assert tokenizer.num_pieces == REFERENCE["vocab_size"]
    printed = {str(i): tokenizer.piece(i) for i in range(tokenizer.num_pieces)}
    assert printed == REFERENCE["output_text_of_id"]


def test_an_empty_prompt_has_no_ids(tokenizer):
    assert tokenizer.encode_prompt("") == []


@pytest.mark.parametrize("text", [" ", "  \n\t "])
def test_blanks_are_wrapped_as_the_reference_does(tokenizer, text):
    """NVIDIA's ``wrap_with_system_tags``; only an empty text is none at all."""
    assert wrap_prompt(text) == "<system>  <system>"
    assert tokenizer.encode_prompt(text) == tokenizer.encode_prompt(wrap_prompt(text))
    assert tokenizer.encode_prompt(text)


@pytest.mark.parametrize("idx", [-1, 512])
def test_ids_outside_the_table_are_a_callers_mistake(tokenizer, idx):
    with pytest.raises(ValueError, match=str(idx)):
        tokenizer.piece(idx)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(PplexError, match="none.model does not exist"):
        TextTokenizer.load(tmp_path / "none.model")


@pytest.mark.parametrize("content", [b"", b"not a model at all", None])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "broken.model"
    shutil.copyfile(MODEL, path)
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(PplexError, match="broken.model"):
        TextTokenizer.load(path)
