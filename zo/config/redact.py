"""Remove secrets from what is stored: run folders, model cards and the commands in them.

A value is a secret by the key that it is given to (a password, a token), by its own form (a hub's
token), by its place in an address (``user:password@``), or by its randomness where the key is
called a key. What a variable of the environment holds whose name says that it is a secret
(``WANDB_API_KEY``) is one wherever it stands.
"""

import os
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
ASSIGNED, VALUE = (
    re.compile(r"(?<![\w.\-])([\w.\-]+)(?:=|%3[dD])"),
    re.compile(r"[^\s&;,'\"{}\[\]]+"),
)
"""``key=value`` anywhere in a text: an override, an address's query. A key begins where a word
does: from each letter of a long one the time would grow as its square."""
MOST_KEY = 200
"""Characters of a key, and of a random value, at most."""
ADDRESS = re.compile(r"(?<![\w+.\-])(?P<scheme>[\w+.\-]+://)[^\s/?#'\"]+@")
"""``scheme://user:password@``; a token alone may stand there too, and a password holds an @."""
BEARER = re.compile(r"(?i)\b(?P<scheme>bearer\s+)(?=\S*\d)[\w+/.~\-]{16,}=*")
"""What an HTTP header says after ``Authorization:``."""
PLACEHOLDER = re.compile(r"\$?\{[^{}]*\}\W*")
"""A template's column, not a value: ``token={text}``."""
FORMS = re.compile(
    r"(?:(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}|\b(?:hf_[A-Za-z0-9]{8,}|(?:api_org|hf_oauth)_[A-Za-z0-9_.\-]{8,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w\-]{16,}|sk-[\w\-]{16,}|xox[abeoprs]-[\w\-]{10,}|A[KS]IA[A-Z0-9]{16}"
    r"|AIza[\w\-]{30,}|wandb_v\d_\w{16,})|(?<![\w\-])ey[JK][\w\-]{10,}\.[\w\-]{4,}(?:\.[\w\-]*)?)"
)
"""Tokens by how their issuers begin them: Hugging Face, GitHub, GitLab, OpenAI's kind, Slack, AWS,
Google, W&B, JWT."""
NO_SECRETS = {"PWD", "OLDPWD"}
"""Variables of a shell whose names look like a password's."""
SECRET_LENGTH = 8
"""A variable's value of fewer characters is not looked for: it may be any word."""
QUOTING, SPACES, MOST_COMMAND = re.compile(r"['\"\\\\]"), re.compile(r"(\s+)"), 2**16
"""Signs by which a shell's words hold spaces; spaces; characters of a command, at most."""
RANDOM_LENGTH, RANDOM_BITS = 16, 3.0
"""A value that long, with that many bits of entropy a character, of letters and digits, is
random."""


def without_secrets(text: str) -> str:
    """Return a text with everything that looks like a secret replaced by ``***``.

    A text that a shell would cut into several words, as a command, is looked at word by word.
    """
    for secret in _secrets_of_environment():
        text = text.replace(secret, STARS)
    text = BEARER.sub(rf"\g<scheme>{STARS}", text)
    if not QUOTING.search(text):
        # The spaces between words stay as they are.
        return "".join(map(_clean, SPACES.split(text)))
    try:
        words = shlex.split(text) if len(text) <= MOST_COMMAND else []
    except ValueError:
        words = []
    if len(words) < 2:
        return _clean(text)
    cleaned = [_clean(word) for word in words]
    # A value with spaces is one word with its key, which only the shell's quotes tell.
    return text if cleaned == words else shlex.join(cleaned)


def _secrets_of_environment() -> list[str]:
    """Return what variables hold whose names say that it is a secret, long ones first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= SECRET_LENGTH and name not in NO_SECRETS and _names_secret(name, value)
    }
    return sorted(found, key=len, reverse=True)


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
        and len(key) <= MOST_KEY
        and re.fullmatch(r"[+~-]*[\w.\-/@]+", key)
        and _names_secret(key.lstrip("+~-"), value)
    ):
        return f"{key}={STARS}"
    word = ADDRESS.sub(rf"\g<scheme>{STARS}@", word)
    word = FORMS.sub(STARS, word)
    return _without_assigned(word)


def _without_assigned(word: str) -> str:
    parts, done = [], 0
    while found := ASSIGNED.search(word, done):
        # A value may be an assignment itself: data.name=https://host/?token=...
        parts.append(word[done : found.end()])
        done = found.end()
        start = VALUE.match(word, done, done + MOST_KEY)
        if start and _names_secret(found[1], start[0]):
            parts.append(STARS)
            done = VALUE.match(word, done).end()  # type: ignore[union-attr]
    return "".join((*parts, word[done:]))


def _names_secret(key: str, value: str) -> bool:
    key = key[-MOST_KEY:]
    if SECRET_KEY.fullmatch(key):
        return not PLACEHOLDER.fullmatch(value)
    return bool(KEY.fullmatch(key)) and _is_random(value[:MOST_KEY])


def _is_random(value: str) -> bool:
    counts = Counter(value).values()
    bits = -sum(n / len(value) * log2(n / len(value)) for n in counts)
    mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    return len(value) >= RANDOM_LENGTH and mixed and bits >= RANDOM_BITS
