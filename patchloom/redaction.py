"""Redaction: what is stored, logged, printed or raised has no passwords, keys and tokens, and no terminal commands.

`redacted` removes user names and passwords from addresses, hides secret options of addresses, and hides the values of
secret environment variables and the passwords inside of addresses in environment variables. The writers of files, the
messages, the exceptions and the MLflow client all use it.
"""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
LEAST_CHARACTERS = 8  # of a value that is hidden wherever it occurs; shorter ones are parts of words
SECRET_VARIABLE = re.compile(
    r"(SECRET|SECRET_(ACCESS_)?KEY|ACCESS_KEY|ACCOUNT_KEY|STORAGE_KEY|API_KEY|TOKEN|PASSWORD|PASSWD|PASSPHRASE|"
    r"CONNECTION_STRING)$"
)
# an S3 secret has slashes, which belong percent-encoded into an address, and often are not
USER_INFO = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*)://(?P<user>[^/?#@\s\"'<>]*)@")
S3_KEYS = re.compile(r"(s3a?)://[^/?#@\s\"'<>]+:[^?#@\s\"'<>]+@")
CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")  # the container is before the @
SECRET_OPTION = re.compile(
    r"((?:[?&;]|&amp;)[\w.-]*(?:secret|passw|pwd|token|credential|signature|api_?key|access_?key|account_?key)[\w.-]*|"
    r"(?:[?&;]|&amp;)(?:sig|key|auth))=[^&\s\"'<>\\]+",
    re.IGNORECASE,
)
# what moves a cursor or changes a terminal, and what reverses the direction of text
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_known: set[str] = set()  # secrets in addresses that this process was given


def redacted(text: str) -> str:
    """The text without secrets."""
    if "://" in text:
        text = S3_KEYS.sub(r"\1://", text)
        text = USER_INFO.sub(_without_user, text)
    if "=" in text:
        text = SECRET_OPTION.sub(rf"\1={HIDDEN}", text)
    for secret in _secrets():
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


def redacted_values(value: Any) -> Any:
    """A value of JSON without secrets in its texts."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: redacted_values(inner) for key, inner in value.items()}
    return [redacted_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def _without_user(match: "re.Match[str]") -> str:
    is_container = match["scheme"].lower() in CONTAINER_SCHEMES and ":" not in match["user"]
    return match[0] if is_container or match["user"] == "anonymous" else f"{match['scheme']}://"


def know_secret(address: str) -> None:
    """Hide the password of an address from now on, also where a library reports it without the address."""
    _known.update(_passwords(address))


def _passwords(address: str) -> Iterator[str]:
    for match in USER_INFO.finditer(address) if "@" in address else ():
        password = match["user"].partition(":")[2]
        for form in (password, unquote(password), quote(unquote(password), safe="")):
            if _can_be_hidden(form):
                yield form


def _secrets() -> list[str]:
    """The longest first, because one may contain another."""
    found = set(_known)
    for name, value in os.environ.items():
        if SECRET_VARIABLE.search(name) and _can_be_hidden(value):
            found |= {value, quote(value, safe="")}
        elif "://" in value:
            found.update(_passwords(value))
    return sorted(found, key=len, reverse=True)


def _can_be_hidden(value: str) -> bool:
    """Not a short word, a number or a path: hiding those would change texts that are no secrets."""
    return len(value) >= LEAST_CHARACTERS and not value.isdigit() and not value.startswith(("/", "~", "."))


def printable(text: str) -> str:
    """The text without secrets, and with control characters in names as visible text such as `\\x1b`.

    A terminal would obey them: change its title, move the cursor, or hide what follows.
    """
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], redacted(text))


class RedactedStream:
    """A text stream that hides secrets in what is written to it.

    Args:
        stream: the stream behind it.
        is_plain: also make control characters visible. Progress bars, which need them, go around it.
    """

    def __init__(self, stream: Any, is_plain: bool = False) -> None:
        self._stream, self._is_plain = stream, is_plain

    @property
    def rich_proxied_file(self) -> Any:
        """What `rich` writes to."""
        return RedactedStream(self._stream)

    def write(self, text: str) -> int:
        """Write a text without secrets; returns the length of the text that was given."""
        self._stream.write(printable(text) if self._is_plain else redacted(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
