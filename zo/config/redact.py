"""Remove secrets from what is stored: run folders, model cards and the commands in them.

A value is a secret by the key that it is given to (a password, a token), by its own form (a hub's
token), by its place in an address (``user:password@``), or by its randomness where the key is
called a key.
"""

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from math import log2
from typing import Any

STARS = "***"
SECRET_KEY = re.compile(
    # Not ``max_tokens`` or ``tokenizer``: a token at the end of a name, and words that are nothing
    # else anywhere in it.
    r"(?i)(?:[\w.\-]*(?:secret|passw|passphrase|credential|signature|api_?key|access_?key|private_?key)[\w\-]*"
    r"|[\w.\-]*(?:token|auth|authorization|bearer|pwd|sig))"
)
KEY = re.compile(r"(?i)[\w.\-]*key")
ASSIGNED = re.compile(r"(?P<key>[A-Za-z_][\w.\-]*)(?P<sign>=|%3[dD])(?P<value>[^\s&;,'\"{}\[\]]+)")
"""``key=value`` anywhere in a text: an override, an address's query."""
ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][\w+.\-]*://)[^\s/@'\"]+@")
"""``scheme://user:password@``; a token alone may stand there too."""
PLACEHOLDER = re.compile(r"\$?\{[^{}]*\}\W*")
"""A template's column, not a value: ``token={text}``."""
FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|(?:api_org|hf_oauth)_[A-Za-z0-9_.\-]{8,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w\-]{16,}|sk-[\w\-]{16,}|xox[abeoprs]-[\w\-]{10,}|A[KS]IA[A-Z0-9]{16}"
    r"|AIza[\w\-]{30,}|ey[JK][\w\-]{10,}\.[\w\-]{4,}(?:\.[\w\-]*)?)"
)
"""Tokens by how their issuers begin them: Hugging Face, GitHub, GitLab, OpenAI's kind, Slack, AWS,
Google, JWT."""
RANDOM_LENGTH, RANDOM_BITS = 16, 3.0
"""A value that long, with that many bits of entropy a character, of letters and digits, is
random."""


def without_secrets(text: str) -> str:
    """Return a text with everything that looks like a secret replaced by ``***``.

    A text that a shell would cut into several words, as a command, is looked at word by word.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    if len(words) < 2:
        return _clean(text)
    cleaned = [_clean(word) for word in words]
    # A value with spaces is one word with its key, which only the shell's quotes tell.
    return text if cleaned == words else shlex.join(cleaned)


def without_secrets_in(tree: Any, key: str = "") -> Any:
    """Return nested groups and lists with the secrets in every text replaced."""
    if isinstance(tree, Mapping):
        return {name: without_secrets_in(inner, str(name)) for name, inner in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_secrets_in(inner, key) for inner in tree]
    if isinstance(tree, str):
        return STARS if tree and _names_secret(key, tree) else without_secrets(tree)
    return tree


def _clean(word: str) -> str:
    """Return one word with its secrets replaced."""
    # The shell's word ``key=value with spaces`` is one value; anything else may hold several.
    key, sign, value = word.partition("=")
    if (
        sign
        and value
        and re.fullmatch(r"[+~-]*[\w.\-/@]+", key)
        and _names_secret(key.lstrip("+~-"), value)
    ):
        return f"{key}={STARS}"
    word = ADDRESS.sub(rf"\g<scheme>{STARS}@", word)
    word = FORMS.sub(STARS, word)
    return ASSIGNED.sub(_without_value, word)


def _without_value(found: re.Match[str]) -> str:
    if not _names_secret(found["key"], found["value"]):
        # The value may be an assignment itself: data.name=https://host/?token=...
        rest = ASSIGNED.sub(_without_value, found["value"])
        return f"{found['key']}{found['sign']}{rest}"
    return f"{found['key']}{found['sign']}{STARS}"


def _names_secret(key: str, value: str) -> bool:
    if PLACEHOLDER.fullmatch(value):
        return False
    return bool(SECRET_KEY.fullmatch(key)) or (bool(KEY.fullmatch(key)) and _is_random(value))


def _is_random(value: str) -> bool:
    counts = Counter(value).values()
    bits = -sum(n / len(value) * log2(n / len(value)) for n in counts)
    mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    return len(value) >= RANDOM_LENGTH and mixed and bits >= RANDOM_BITS
