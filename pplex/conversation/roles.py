"""The published role prompts, by name, and the seed published with them.

The texts are those of the examples in the README and assets of NVIDIA's PersonaPlex.
"""

from __future__ import annotations

from pplex.errors import PplexError
from pplex.values import shown

ROLES = {
    "teacher": "You are a wise and friendly teacher. Answer questions or provide "
    "advice in a clear and engaging way.",
    "casual": "You enjoy having a good conversation.",
    "service": "You work for SwiftPlex Appliances which is a appliance repair company "
    "and your name is Farhod Toshmatov. Information: The dishwasher model is out of "
    "stock for replacement parts; we can use an alternative part with a 3-day delay. "
    "Labor cost remains $60 per hour.",
}
DEFAULT_ROLE = "teacher"
DEFAULT_SEED = 42424242  # that of NVIDIA's examples


def role_words(prompt: str | None, role: str | None, where: str) -> str | None:
    """The role in words, given as such or by its name; None where it is left open."""
    if role is None:
        return prompt
    if prompt is not None:
        raise PplexError(f"{where}: prompt and role exclude each other")
    if role not in ROLES:
        raise PplexError(
            f"{where}: there is no role {shown(role)}; give one of {', '.join(ROLES)}, "
            "or the words as prompt"
        )
    return ROLES[role]
