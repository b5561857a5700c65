"""Remove secrets from messages."""

import os
import re

URL_LOGIN = re.compile(r"(?<=://)[^/\s]*@")
SECRET_NAMES, MIN_SECRET_LENGTH = ("KEY", "TOKEN", "SECRET", "PASSWORD"), 8


def without_secrets(text: str) -> str:
    """Replace logins in URLs, and the values of environment variables such as OPENAI_API_KEY or HF_TOKEN, with `***`.

    Example:
        >>> without_secrets("http://token@mirror/v1 failed")
        'http://***@mirror/v1 failed'
    """
    values = {value.strip() for name, value in os.environ.items() if name.upper().endswith(SECRET_NAMES)}
    for value in sorted(values, key=len, reverse=True):  # one may be the beginning of another
        if len(value) >= MIN_SECRET_LENGTH:  # a shorter one may be part of any word
            text = text.replace(value, "***")
    return URL_LOGIN.sub("***@", text)
