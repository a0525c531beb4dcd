"""Whether the network and a login are there; asked only on request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Online:
    """``user`` is None without a login; ``reason`` says what failed."""

    reachable: bool
    user: str | None
    reason: str | None


def look_online() -> Online:
    """Ask Hugging Face who we are: one request, or two without a login."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    try:
        if huggingface_hub.get_token() is None:
            api.model_info("nvidia/personaplex-7b-v1", timeout=10)
            return Online(True, None, None)
        return Online(True, str(api.whoami()["name"]), None)
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        return Online(True, None, f"Hugging Face answered {status}")
    except Exception as e:  # every kind of network fault, of any HTTP library
        return Online(False, None, str(e).splitlines()[0][:200] or type(e).__name__)
